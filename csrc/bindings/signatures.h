// Writes down every kernel's C++ signature in a schema's words, for schema.py to compare. The stable ABI itself checks
// only the number of arguments: an int that C++ takes for a double is a silent wrong result.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace ek {

inline std::vector<std::pair<std::string, std::string>>& kernels() {  // name, signature
  static std::vector<std::pair<std::string, std::string>> all;
  return all;
}

template <class T>
struct Type {};  // a C++ type as a value; a type that no word() takes doesn't compile

inline std::string word(Type<int64_t>) { return "int"; }
inline std::string word(Type<double>) { return "float"; }
inline std::string word(Type<bool>) { return "bool"; }

template <class T>
std::string word(Type<std::optional<T>>) {
  return "Optional[" + word(Type<T>()) + "]";
}

template <class T>
std::string word(Type<std::vector<T>>) {
  return "List[" + word(Type<T>()) + "]";
}

template <class... T>
std::string word(Type<std::tuple<T...>>) {  // several results
  return ((word(Type<T>()) + " ") + ...);
}

template <class R, class... Args>
void record(const char* name, R (*)(Args...)) {
  kernels().emplace_back(name, ((word(Type<std::decay_t<Args>>()) + " ") + ... + ("-> " + word(Type<R>()))));
}

}  // namespace ek
