// The errors that mlkit throws. Every public entry point checks its arguments before it writes to any output.
#pragma once

#include <concepts>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>

#include "config.hpp"

namespace MLKIT_NAMESPACE {

/// Base of every exception that mlkit throws on purpose.
struct error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

/// Shapes, strides or overlaps that do not fit together.
struct shape_error : error {
  explicit shape_error(const std::string& what) : error("mlkit::shape_error: " + what) {}
};

/// A value outside its range, or not finite.
struct value_error : error {
  explicit value_error(const std::string& what) : error("mlkit::value_error: " + what) {}
};

/// A file that cannot be read, written or understood.
struct io_error : error {
  explicit io_error(const std::string& what) : error("mlkit::io_error: " + what) {}
};

/// A device call that failed.
struct device_error : error {
  explicit device_error(const std::string& what) : error("mlkit::device_error: " + what) {}
};

/// A collective operation that failed, on this rank or another.
struct comm_error : error {
  explicit comm_error(const std::string& what) : error("mlkit::comm_error: " + what) {}
};

namespace detail {

// One piece of a message: text or a number. Messages are put together out of line, once for all calls, so that checks
// cost a translation unit little to compile.
class message_part {
 public:
  message_part(std::string_view s) noexcept : kind_(kind::text), text_(s) {}
  message_part(const char* s) noexcept : message_part(std::string_view(s)) {}
  message_part(const std::string& s) noexcept : message_part(std::string_view(s)) {}
  template <std::signed_integral T>
  message_part(T value) noexcept : kind_(kind::integer), integer_(value) {}
  template <std::unsigned_integral T>
  message_part(T value) noexcept : kind_(kind::natural), natural_(value) {}
  template <std::floating_point T>
  message_part(T value) noexcept : kind_(kind::real), real_(static_cast<double>(value)) {}

  void append_to(std::string& s) const {
    switch (kind_) {
      case kind::text: s += text_; break;
      case kind::integer: s += std::to_string(integer_); break;
      case kind::natural: s += std::to_string(natural_); break;
      case kind::real: s += real_text(real_); break;
    }
  }

 private:
  // The shortest text that reads as the value again, or as the float that the value is: 1.5, 0.8, 1e-09.
  static std::string real_text(double value) {
    char text[40] = {};
    for (int digits = 6; digits <= 17; ++digits) {
      std::snprintf(text, sizeof text, "%.*g", digits, value);
      const double read = std::strtod(text, nullptr);
      if (read == value || (static_cast<double>(static_cast<float>(value)) == value &&
                            static_cast<float>(read) == static_cast<float>(value)))
        break;
    }
    return text;
  }

  enum class kind { text, integer, natural, real } kind_;
  std::string_view text_;
  union {
    long long integer_ = 0;
    unsigned long long natural_;
    double real_;
  };
};

inline std::string concatenate(std::initializer_list<message_part> parts) {
  std::string s;
  for (const message_part& part : parts) part.append_to(s);
  return s;
}

/// Concatenates strings and numbers into one message.
template <class... Parts>
std::string message(const Parts&... parts) {
  return concatenate({message_part(parts)...});
}

template <class Error>
[[noreturn]] void throw_error(std::initializer_list<message_part> parts) {
  throw Error(concatenate(parts));
}

template <class... Parts>
[[noreturn]] void fail_shape(const Parts&... parts) {
  throw_error<shape_error>({message_part(parts)...});
}

template <class... Parts>
[[noreturn]] void fail_value(const Parts&... parts) {
  throw_error<value_error>({message_part(parts)...});
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE
