// Any bytes are either refused with an io_error or are a file whose tensors can all be used, and which written and read
// again says the same. Each input is tried as a file, and as the header of one whose length is right.
#include <mlkit/io/safetensors.hpp>

#include <cstdint>
#include <cstring>
#include <string_view>

using namespace mlkit;

namespace {

void require(bool holds) {
  if (!holds) __builtin_trap();
}

template <class T>
void touch(const io::tensor_info& t) {
  if (!io::detail::views<T>(t.dtype)) return;
  const auto elements = t.elements<T>();
  require(elements.size() == static_cast<std::size_t>(t.count()));
  require(elements.empty() || reinterpret_cast<std::uintptr_t>(elements.data()) % alignof(T) == 0);
  // Whatever the bytes are, each can be read.
  unsigned zeros = 0;
  for (const std::byte b : std::as_bytes(elements)) zeros += b == std::byte{0};
  require(zeros <= t.bytes);
  if (t.rank() == 2) require((t.view<T, 2>().size() == t.count()));
}

void use(std::span<const std::byte> bytes, bool trailing_bytes) {
  io::safetensors file;
  try {
    file = io::parse_safetensors(bytes, {.trailing_bytes = trailing_bytes});
  } catch (const io_error&) {
    return;
  }
  for (const io::tensor_info& t : file) {
    require(file.find(t.name) == &t);
    touch<float>(t);
    touch<double>(t);
    touch<f16>(t);
    touch<std::uint8_t>(t);
    touch<std::int16_t>(t);
    touch<std::int64_t>(t);
    std::vector<float> converted(static_cast<std::size_t>(t.count()));
    try {
      t.copy_to(std::span<float>(converted));
      if (t.count() == 1) (void)t.scalar();
    } catch (const io_error&) {  // not a float
    }
  }
  const std::vector<std::byte> written = io::safetensors_bytes(file.tensors(), file.metadata());
  const io::safetensors again = io::parse_safetensors(written);
  require(again.size() == file.size() && again.metadata() == file.metadata());
  for (const io::tensor_info& t : file) {
    const io::tensor_info& u = again.at(t.name);
    require(u.dtype == t.dtype && u.shape == t.shape && u.bytes == t.bytes);
    require(t.bytes == 0 || std::memcmp(u.data, t.data, t.bytes) == 0);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::span bytes(reinterpret_cast<const std::byte*>(data), size);
  use(bytes, false);
  use(bytes, true);
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  const std::size_t end = text.rfind('}');
  if (end != std::string_view::npos) {
    const std::uint64_t length = end + 1;
    std::vector<std::byte> file(8);
    std::memcpy(file.data(), &length, 8);
    file.insert(file.end(), bytes.begin(), bytes.end());
    use(file, true);
  }
  return 0;
}
