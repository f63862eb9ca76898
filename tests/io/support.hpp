// What the io tests share: files made by hand, and the message of an error.
#pragma once

#include <mlkit/io/safetensors.hpp>

#include "../temporary_directory.hpp"
#include "test_data.hpp"

#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

inline std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  REQUIRE(file);
  return {std::istreambuf_iterator<char>(file), {}};
}

inline void store(const std::string& path, std::string_view text) {
  std::ofstream(path, std::ios::binary).write(text.data(), static_cast<std::streamsize>(text.size()));
}

/// A safetensors file from a header's text and the number of data bytes after it (byte i is i).
inline std::vector<std::byte> file_of(std::string_view header, std::size_t size) {
  std::vector<std::byte> bytes(8);
  for (std::size_t i = 0; i < 8; ++i) bytes[i] = static_cast<std::byte>(header.size() >> (8 * i));
  for (const char c : header) bytes.push_back(static_cast<std::byte>(c));
  for (std::size_t i = 0; i < size; ++i) bytes.push_back(static_cast<std::byte>(i));
  return bytes;
}

/// The message of the E that f throws; a test failure if it throws none.
template <class E, class F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const E& e) {
    return e.what();
  } catch (const std::exception& e) {
    FAIL("another exception: " << e.what());
  }
  FAIL("no exception");
  return {};
}

template <class F>
std::string io_failure(F&& f) {
  return message_of<mlkit::io_error>(f);
}
