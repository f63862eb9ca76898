// The part of JSON (RFC 8259) that a safetensors header needs: a strict cursor over text, and strings in and out.
// It never recurses: what may stand where is for the caller to say, so depth is bounded by the caller's code.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "../../core/config.hpp"
#include "../../core/error.hpp"

namespace MLKIT_NAMESPACE::detail {

template <class... Parts>
[[noreturn]] void fail_io(const Parts&... parts) {
  throw io_error(message(parts...));
}

/// The length of the UTF-8 sequence that starts at text[at], or 0 if it is not valid (RFC 3629: no overlong forms, no
/// surrogates, nothing above U+10FFFF).
inline std::size_t utf8_sequence(std::string_view text, std::size_t at) noexcept {
  const auto byte = [&](std::size_t i) -> unsigned {
    return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0u;
  };
  const auto tail = [&](std::size_t i) { return (byte(i) & 0xc0u) == 0x80u; };
  const unsigned first = byte(0);
  if (first < 0x80u) return 1;
  if (first >= 0xc2u && first < 0xe0u) return tail(1) ? 2 : 0;
  if (first >= 0xe0u && first < 0xf0u) {
    const bool second = first == 0xe0u ? byte(1) >= 0xa0u : first == 0xedu ? byte(1) < 0xa0u : true;
    return second && tail(1) && tail(2) ? 3 : 0;
  }
  if (first >= 0xf0u && first < 0xf5u) {
    const bool second = first == 0xf0u ? byte(1) >= 0x90u : first == 0xf4u ? byte(1) < 0x90u : true;
    return second && tail(1) && tail(2) && tail(3) ? 4 : 0;
  }
  return 0;
}

inline bool is_utf8(std::string_view text) noexcept {
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t length = utf8_sequence(text, at);
    if (length == 0) return false;
    at += length;
  }
  return true;
}

inline void append_utf8(std::string& out, std::uint32_t c) {
  const auto put = [&](std::uint32_t byte) { out.push_back(static_cast<char>(byte)); };
  if (c < 0x80u) {
    put(c);
  } else if (c < 0x800u) {
    put(0xc0u | (c >> 6));
    put(0x80u | (c & 0x3fu));
  } else if (c < 0x10000u) {
    put(0xe0u | (c >> 12));
    put(0x80u | ((c >> 6) & 0x3fu));
    put(0x80u | (c & 0x3fu));
  } else {
    put(0xf0u | (c >> 18));
    put(0x80u | ((c >> 12) & 0x3fu));
    put(0x80u | ((c >> 6) & 0x3fu));
    put(0x80u | (c & 0x3fu));
  }
}

/// Appends text as a JSON string; only what must be escaped is, in the shortest form.
inline void append_json_string(std::string& out, std::string_view text) {
  constexpr char hex[] = "0123456789abcdef";
  out += '"';
  for (const char c : text) {
    const auto u = static_cast<unsigned char>(c);
    const char* const shorts = "btn\0fr";  // U+0008 .. U+000D
    if (c == '"' || c == '\\') {
      (out += '\\') += c;
    } else if (u >= 0x08 && u <= 0x0d && u != 0x0b) {
      (out += '\\') += shorts[u - 0x08];
    } else if (u < 0x20) {
      ((out += "\\u00") += hex[u >> 4]) += hex[u & 15];
    } else {
      out += c;
    }
  }
  out += '"';
}

/// Text for an error message: quoted, cut after 200 bytes, control characters and bad UTF-8 shown as '?'.
inline std::string in_quotes(std::string_view text) {
  std::string s = "\"";
  std::size_t at = 0;
  for (; at < text.size() && s.size() < 200;) {
    const std::size_t length = utf8_sequence(text, at);
    const auto u = static_cast<unsigned char>(text[at]);
    if (length == 0 || u < 0x20 || u == 0x7f)
      s += '?';
    else
      s.append(text, at, length);
    at += length == 0 ? 1 : length;
  }
  return s + (at < text.size() ? "...\"" : "\"");
}

/// Reads JSON text from front to back. Every failure is an io_error "<source>: <where>: byte <n>: <what>".
class json_cursor {
 public:
  json_cursor(std::string_view text, std::string_view source, std::string_view where)
      : text_(text), source_(source), where_(where) {}

  /// Skips white space; whether the text has ended.
  bool at_end() noexcept {
    skip();
    return at_ == text_.size();
  }
  /// The next character that is not white space, or 0 at the end.
  char peek() noexcept { return at_end() ? '\0' : text_[at_]; }
  bool take(char c) noexcept {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail("expected '", std::string(1, c), "'", found());
  }

  std::string string() {
    if (!take('"')) fail("expected a string", found());
    std::string s;
    for (;;) {
      if (at_ == text_.size()) fail("a string does not end");
      const auto c = static_cast<unsigned char>(text_[at_]);
      if (c == '"') {
        ++at_;
        return s;
      }
      if (c < 0x20) fail("a control character in a string is not escaped");
      if (c == '\\') {
        ++at_;
        escape(s);
        continue;
      }
      const std::size_t length = utf8_sequence(text_, at_);
      if (length == 0) fail("a string is not valid UTF-8");
      s.append(text_, at_, length);
      at_ += length;
    }
  }

  /// An integer in [0, 2^63 - 1]: no sign, fraction, exponent or leading zero.
  index_t natural() {
    const char first = peek();
    if (first < '0' || first > '9') fail("expected a non-negative integer", found());
    index_t value = 0;
    const std::size_t start = at_;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
      const index_t digit = text_[at_] - '0';
      if (value > (INT64_MAX - digit) / 10) fail("an integer is above 2^63 - 1");
      value = value * 10 + digit;
    }
    if (first == '0' && at_ - start > 1) fail("an integer has a leading zero");
    if (at_ < text_.size() && (text_[at_] == '.' || text_[at_] == 'e' || text_[at_] == 'E'))
      fail("expected an integer, found a number with a fraction or an exponent");
    return value;
  }

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    fail_io(source_, ": ", where_, ": byte ", at_, ": ", parts...);
  }

 private:
  void skip() noexcept {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
      ++at_;
  }
  std::string found() const {
    return at_ == text_.size() ? ", found the end" : ", found " + in_quotes(text_.substr(at_, 1));
  }
  std::uint32_t hex4() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = at_ < text_.size() ? text_[at_] : '\0';
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail("\\u needs four hexadecimal digits");
      value = value * 16 + static_cast<std::uint32_t>(digit);
    }
    return value;
  }
  void escape(std::string& s) {
    const char c = at_ < text_.size() ? text_[at_++] : '\0';
    switch (c) {
      case '"':
      case '\\':
      case '/': s += c; return;
      case 'b': s += '\b'; return;
      case 'f': s += '\f'; return;
      case 'n': s += '\n'; return;
      case 'r': s += '\r'; return;
      case 't': s += '\t'; return;
      case 'u': break;
      default: fail("an escape in a string is unknown");
    }
    std::uint32_t code = hex4();
    if (code >= 0xdc00u && code < 0xe000u) fail("a low surrogate stands alone");
    if (code >= 0xd800u && code < 0xdc00u) {
      if (text_.substr(at_, 2) != "\\u") fail("a high surrogate stands alone");
      at_ += 2;
      const std::uint32_t low = hex4();
      if (low < 0xdc00u || low >= 0xe000u) fail("a high surrogate stands alone");
      code = 0x10000u + ((code - 0xd800u) << 10) + (low - 0xdc00u);
    }
    append_utf8(s, code);
  }

  std::string_view text_, source_, where_;
  std::size_t at_ = 0;
};

}  // namespace MLKIT_NAMESPACE::detail
