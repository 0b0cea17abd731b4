// Test-only: runs a CUDA kernel's source on the CPU, one fiber per thread of a block. Include this, then the kernel,
// then call host_cuda::launch(blocks, threads, [&] { kernel(params); }).
//
// Fibers run from barrier to barrier, in a new random order each round. Each block starts with its shared memory filled
// with `poison` (NaN), so that a kernel that lacks a barrier reads NaN. What would hang on a GPU throws: a barrier that
// can't open, a warp function called by a lane that its mask doesn't name; so does a misaligned vector load. With
// `left_out_barrier`, a test can show that it would notice.
#pragma once
#include <link.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace host_cuda {

inline int poison = 0xFF;          // what each byte of fresh shared memory holds
inline unsigned seed = 1;          // of the order in which fibers run
inline int left_out_barrier = -1;  // the __syncthreads() that every thread runs past, of those it comes to; -1: none
inline int barriers_met;           // in the last launch, by the thread that came to most

struct Barrier {  // of a block, or of the lanes of a warp that one mask names
  unsigned expected, arrived = 0;
  uint64_t times_opened = 0;
  alignas(16) unsigned char slot[2][32][16];  // what each lane passes to a warp function, in turn
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  unsigned rank = 0;  // in its block
  int barriers = 0;   // met so far
  bool left = false;  // the kernel
  Barrier* waits_for = nullptr;
  uint64_t until = 0;  // waits_for has opened so often

  static constexpr size_t stack_bytes = 128 * 1024;
  bool is_ready() const { return !waits_for || waits_for->times_opened >= until; }
};

inline std::function<void()> kernel;
inline std::vector<Fiber> fibers;  // of the block that runs now
inline Fiber* running;
inline ucontext_t scheduler;
inline std::map<uint64_t, Barrier> barriers;
inline std::string error;  // found inside a fiber: an exception can't leave one

inline void yield() { swapcontext(&running->context, &scheduler); }

[[noreturn]] inline void fail(const std::string& what) {
  error = what;
  for (;;) yield();
}

inline void run_fiber() {
  kernel();
  running->left = true;
}

}  // namespace host_cuda

// CUDA's words; after the std headers, which use some of the names.
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
// Thread-local variables lie together in one block that can be found and filled, wherever they're declared. (A section
// of their own would be plainer, but GCC 12 silently ignores that attribute in templates.) Of an index beyond such an
// array only UBSan tells, not ASan.
#define __shared__ static thread_local

struct dim3 {
  unsigned x, y, z;
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;

#pragma GCC diagnostic ignored "-Wclass-memaccess"  // of uint4, which in CUDA is plain memory
// May alias anything, as in CUDA. A copy looks whether it comes from an aligned address and goes to one.
struct __attribute__((may_alias, aligned(16))) uint4 {
  unsigned x, y, z, w;

  uint4() = default;
  uint4(const uint4& other) { *this = other; }
  uint4& operator=(const uint4& other) {
    check(this);
    check(&other);
    std::memcpy(static_cast<void*>(this), &other, 16);
    return *this;
  }
  static void check(const void* p) {
    uintptr_t address = reinterpret_cast<uintptr_t>(p);
    __asm__("" : "+r"(address));  // the compiler may not conclude from the type that it is aligned
    if (address % 16) host_cuda::fail("misaligned vector load or store");
  }
};

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return float(x.value); }
inline __half __float2half_rn(float x) { return {_Float16(x)}; }
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};  // to the nearest, ties to even
}

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }

namespace host_cuda {

inline int poison_shared_memory(dl_phdr_info* module, size_t, void*) {
  for (int i = 0; i < module->dlpi_phnum; i++) {
    const auto& segment = module->dlpi_phdr[i];
    if (segment.p_type == PT_TLS) std::memset(module->dlpi_tls_data, poison, segment.p_memsz);
  }
  return 1;  // stop: the first module is the test program, the rest are libraries
}

inline void run_block(std::mt19937& random) {
  dl_iterate_phdr(poison_shared_memory, nullptr);
  barriers.clear();
  error.clear();
  size_t alive = fibers.size();
  for (size_t i = 0; i < fibers.size(); i++) {
    Fiber& fiber = fibers[i];
    fiber.rank = unsigned(i);
    fiber.left = false;
    fiber.barriers = 0;
    fiber.waits_for = nullptr;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::stack_bytes;
    fiber.context.uc_link = &scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  while (alive > 0) {
    std::vector<Fiber*> ready;
    for (Fiber& fiber : fibers) {
      if (!fiber.left && fiber.is_ready()) ready.push_back(&fiber);
    }
    if (ready.empty()) {
      throw std::logic_error("deadlock: " + std::to_string(alive) + " threads wait at a barrier, " +
                             std::to_string(fibers.size() - alive) + " have left the kernel");
    }
    std::shuffle(ready.begin(), ready.end(), random);
    for (Fiber* fiber : ready) {
      running = fiber;
      threadIdx = {fiber->rank, 0, 0};
      swapcontext(&scheduler, &fiber->context);
      if (!error.empty()) throw std::logic_error(error);
      alive -= fiber->left;
    }
  }
}

inline void launch(int64_t blocks, unsigned threads, std::function<void()> body) {
  if (threads == 0 || threads % 32 || threads > 1024) throw std::logic_error("a block must consist of whole warps");
  if (blocks <= 0 || blocks > INT32_MAX) throw std::logic_error("CUDA refuses a grid of this size");
  std::mt19937 random(seed);
  barriers_met = 0;
  kernel = std::move(body);
  gridDim = {unsigned(blocks), 1, 1};
  blockDim = {threads, 1, 1};
  if (fibers.size() != threads) fibers = std::vector<Fiber>(threads);
  for (unsigned i = 0; i < blocks; i++) {
    blockIdx = {i, 0, 0};
    run_block(random);
  }
}

// Arrives, and waits until all have.
inline void wait(Barrier& barrier) {
  const uint64_t until = barrier.times_opened + 1;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    barrier.times_opened = until;
  }
  running->waits_for = &barrier;
  running->until = until;
  yield();  // the last one too: the others may run first
  running->waits_for = nullptr;
}

inline Barrier& barrier_of_warp(unsigned mask) {
  const unsigned warp = running->rank / 32, lane = running->rank % 32;
  if (!(mask >> lane & 1)) fail("a warp function's mask doesn't name the lane that calls it");
  Barrier& barrier = barriers[uint64_t(warp) << 32 | mask];
  barrier.expected = unsigned(__builtin_popcount(mask));
  return barrier;
}

// The values that the lanes of a warp pass to the same call. The next call has the other half of `slot`: nothing is
// overwritten before all have read it.
template <class T>
class Exchange {
 public:
  Exchange(unsigned mask, T value) : mask_(mask), barrier_(barrier_of_warp(mask)) {
    static_assert(sizeof(T) <= 16);
    turn_ = barrier_.times_opened % 2;
    std::memcpy(barrier_.slot[turn_][running->rank % 32], &value, sizeof value);
    wait(barrier_);
  }
  T from(unsigned lane) const {  // poison if the mask doesn't name it
    T value;
    std::memset(static_cast<void*>(&value), 0xFF, sizeof value);
    if (mask_ >> lane & 1) std::memcpy(&value, barrier_.slot[turn_][lane], sizeof value);
    return value;
  }

 private:
  unsigned mask_;
  Barrier& barrier_;
  uint64_t turn_;
};

}  // namespace host_cuda

inline void __syncthreads() {
  host_cuda::Fiber& me = *host_cuda::running;
  const int index = me.barriers++;
  host_cuda::barriers_met = std::max(host_cuda::barriers_met, me.barriers);
  if (index == host_cuda::left_out_barrier) return;
  host_cuda::Barrier& barrier = host_cuda::barriers[~0ull];
  barrier.expected = unsigned(host_cuda::fibers.size());
  host_cuda::wait(barrier);
}

inline void __syncwarp(unsigned mask = ~0u) { host_cuda::wait(host_cuda::barrier_of_warp(mask)); }

template <class T>
T __shfl_sync(unsigned mask, T value, unsigned lane) {
  return host_cuda::Exchange<T>(mask, value).from(lane % 32);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
  const unsigned lane = host_cuda::running->rank % 32;
  return host_cuda::Exchange<T>(mask, value).from(lane ^ bits);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = host_cuda::running->rank % 32;
  return host_cuda::Exchange<T>(mask, value).from(lane + delta < 32 ? lane + delta : lane);
}

inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const host_cuda::Exchange<unsigned> votes(mask, predicate);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; lane++) bits |= unsigned((mask >> lane & 1) && votes.from(lane)) << lane;
  return bits;
}
