// safetensors: tensors with names in a file that is mapped, checked and never executed.
// The format: u64 N (little endian), a JSON header of N bytes, then the data that the header points into.
// https://github.com/huggingface/safetensors#format
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstring>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "../core/config.hpp"
#include "../core/dtype.hpp"
#include "../core/error.hpp"
#include "../core/tensor.hpp"
#include "../core/view.hpp"
#include "detail/files.hpp"
#include "detail/json_text.hpp"

static_assert(std::endian::native == std::endian::little, "safetensors files are little endian, and so is mlkit");

namespace MLKIT_NAMESPACE::io {

/// Every element type of the format, in the order in which its writers sort them (descending).
enum class dtype : std::uint8_t {
  boolean,
  f4,
  f6_e2m3,
  f6_e3m2,
  u8,
  i8,
  f8_e5m2,
  f8_e4m3,
  f8_e8m0,
  f8_e4m3fnuz,
  f8_e5m2fnuz,
  i16,
  u16,
  f16,
  bf16,
  i32,
  u32,
  f32,
  c64,
  f64,
  i64,
  u64,
};

namespace detail {

struct dtype_entry {
  std::string_view name;
  int bits;
};

inline constexpr dtype_entry dtype_table[] = {
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
};

}  // namespace detail

/// The name that the format uses: "F32", "BF16", ...
constexpr std::string_view name_of(dtype d) noexcept { return detail::dtype_table[static_cast<int>(d)].name; }

/// Bits of one element; F4 and F6 elements are packed without gaps.
constexpr int bits_of(dtype d) noexcept { return detail::dtype_table[static_cast<int>(d)].bits; }

/// The dtype that stores a C++ type: float, double, bf16, f16, bool and the integers of 8 to 64 bits.
template <class T>
constexpr dtype dtype_of() noexcept {
  if constexpr (std::is_same_v<T, float>) return dtype::f32;
  if constexpr (std::is_same_v<T, double>) return dtype::f64;
  if constexpr (std::is_same_v<T, mlkit::bf16>) return dtype::bf16;
  if constexpr (std::is_same_v<T, mlkit::f16>) return dtype::f16;
  if constexpr (std::is_same_v<T, bool>) return dtype::boolean;
  if constexpr (std::is_integral_v<T> && !std::is_same_v<T, bool>) {
    static_assert(sizeof(T) <= 8);
    constexpr dtype of_signed[] = {dtype::i8, dtype::i16, dtype::i32, dtype::i64};
    constexpr dtype of_unsigned[] = {dtype::u8, dtype::u16, dtype::u32, dtype::u64};
    return (std::is_signed_v<T> ? of_signed : of_unsigned)[std::countr_zero(sizeof(T))];
  }
}

namespace detail {

using namespace mlkit::detail;

template <class T>
concept file_element = storage<T> || std::integral<T>;

// Whether a T may look at stored elements of this dtype. Bytes may look at all that is one byte wide but I8; a C++ bool
// may not look at BOOL, because a file can hold bytes other than 0 and 1.
template <file_element T>
constexpr bool views(dtype d) noexcept {
  if (std::is_same_v<T, std::uint8_t>) return bits_of(d) == 8 && d != dtype::i8;
  return !std::is_same_v<T, bool> && d == dtype_of<T>();
}

inline std::string shape_text(const std::vector<index_t>& shape) {
  std::string s = "[";
  for (std::size_t d = 0; d < shape.size(); ++d) s += (d ? ", " : "") + std::to_string(shape[d]);
  return s + "]";
}

// 8-bit floats, as "FP8 formats for deep learning" (Micikevicius et al., 2022) and the OCP MX specification define
// them.
template <int Mantissa, int Bias, bool Ieee, bool Fnuz>
float small_float(std::uint8_t bits) noexcept {
  constexpr int exponent_bits = 7 - Mantissa;
  const int exponent = (bits >> Mantissa) & ((1 << exponent_bits) - 1);
  const int mantissa = bits & ((1 << Mantissa) - 1);
  const bool negative = bits & 0x80;
  const auto nan = std::bit_cast<float>(negative ? 0xffc00000u : 0x7fc00000u);
  if (Fnuz && bits == 0x80) return nan;
  if (!Fnuz && !Ieee && (bits & 0x7f) == 0x7f) return nan;
  if (Ieee && exponent == (1 << exponent_bits) - 1) {
    if (mantissa != 0) return nan;
    return std::bit_cast<float>(negative ? 0xff800000u : 0x7f800000u);
  }
  const auto power = [](int e) { return std::bit_cast<float>(static_cast<std::uint32_t>(e + 127) << 23); };
  const float magnitude = exponent == 0
                              ? static_cast<float>(mantissa) * power(1 - Bias - Mantissa)
                              : static_cast<float>(mantissa + (1 << Mantissa)) * power(exponent - Bias - Mantissa);
  return negative ? -magnitude : magnitude;
}

template <storage T, std::floating_point V>
T narrow(V value) noexcept {
  if constexpr (std::is_same_v<T, double>)
    return static_cast<double>(value);
  else
    return static_cast<T>(static_cast<float>(value));
}

// Calls f(size, load) with load(const std::byte*) giving the element as float or double; false if d is not a float.
template <class F>
bool with_float_loader(dtype d, F&& f) {
  const auto raw = []<class T>(std::type_identity<T>) {
    return [](const std::byte* p) noexcept {
      T value;
      std::memcpy(&value, p, sizeof(T));
      if constexpr (std::is_same_v<T, double>)
        return value;
      else
        return static_cast<float>(value);
    };
  };
  const auto code = [](float (*decode)(std::uint8_t)) {
    return [decode](const std::byte* p) noexcept { return decode(std::to_integer<std::uint8_t>(*p)); };
  };
  switch (d) {
    case dtype::f32: f(4, raw(std::type_identity<float>{})); return true;
    case dtype::f64: f(8, raw(std::type_identity<double>{})); return true;
    case dtype::f16: f(2, raw(std::type_identity<mlkit::f16>{})); return true;
    case dtype::bf16: f(2, raw(std::type_identity<mlkit::bf16>{})); return true;
    case dtype::f8_e4m3: f(1, code(small_float<3, 7, false, false>)); return true;
    case dtype::f8_e5m2: f(1, code(small_float<2, 15, true, false>)); return true;
    case dtype::f8_e4m3fnuz: f(1, code(small_float<3, 8, false, true>)); return true;
    case dtype::f8_e5m2fnuz: f(1, code(small_float<2, 16, false, true>)); return true;
    case dtype::f8_e8m0:
      f(1, code([](std::uint8_t e) {
          return std::bit_cast<float>(e == 255 ? 0x7fc00000u : e == 0 ? 0x00400000u : std::uint32_t{e} << 23);
        }));
      return true;
    default: return false;
  }
}

}  // namespace detail

/// One tensor with its name: what a file holds, and what the writer takes. It looks at its bytes and, where they are a
/// file's, keeps the file's mapping alive; copying one copies no data.
struct tensor_info {
  std::string name;
  io::dtype dtype = io::dtype::f32;
  std::vector<index_t> shape;       ///< row-major; empty for a scalar
  const std::byte* data = nullptr;  ///< may be aligned to one byte only; view() takes care of that
  std::size_t bytes = 0;
  std::shared_ptr<const mlkit::detail::byte_image> owner;  ///< what `data` points into, if that is shared
  std::string source;                                      ///< the file, for messages

  index_t rank() const noexcept { return static_cast<index_t>(shape.size()); }
  /// The number of elements.
  index_t count() const noexcept {
    index_t n = 1;
    for (const index_t e : shape) n *= e;
    return n;
  }

  /// The elements where they are: no copy, unless the file put them at an address that T cannot be read from; then
  /// they are copied once and the copy is kept with the file. std::uint8_t looks at any element of one byte (BOOL and
  /// 8-bit floats too). Throws io_error if the dtype or the rank is another. The view is good while this tensor_info, a
  /// copy of it, or its file lives.
  template <detail::file_element T, int Rank>
  tensor_view<const T, Rank> view() const {
    const T* const at = elements<T>().data();
    return {at, extents<Rank>()};
  }

  /// view() whatever the rank: the elements in row-major order.
  template <detail::file_element T>
  std::span<const T> elements() const {
    if (!detail::views<T>(dtype))
      detail::fail_io(describe(), " has dtype ", name_of(dtype), ", but ", name_of(dtype_of<T>()), " was asked for");
    const std::byte* const at = owner ? owner->aligned(data, bytes, alignof(T)) : data;
    return {reinterpret_cast<const T*>(at), bytes / sizeof(T)};
  }

  /// A copy, converted from any floating-point dtype (8 to 64 bits). Rounds to nearest even.
  /// Throws io_error if the dtype is not a float or the rank is another.
  template <storage T, int Rank>
  mlkit::tensor<T, Rank> tensor() const {
    mlkit::tensor<T, Rank> result(extents<Rank>(), uninitialized);
    copy_to(std::span<T>(result.data(), static_cast<std::size_t>(result.size())));
    return result;
  }

  /// The same into the user's memory, whatever the rank. Throws shape_error if the number of elements differs.
  template <storage T>
  void copy_to(std::span<T> out) const {
    if (static_cast<index_t>(out.size()) != count())
      detail::fail_shape(describe(), " has ", count(), " elements, but the output has ", out.size());
    const bool is_float = detail::with_float_loader(dtype, [&](std::size_t size, auto load) {
      if (dtype == dtype_of<T>()) {
        if (bytes > 0) std::memcpy(out.data(), data, bytes);
        return;
      }
      for (std::size_t i = 0; i < out.size(); ++i) out[i] = detail::narrow<T>(load(data + i * size));
    });
    if (!is_float)
      detail::fail_io(describe(), " has dtype ", name_of(dtype), ", but a floating-point dtype was asked for");
  }

  /// The value of a tensor with one element, of any float or integer dtype, as f64.
  double scalar() const {
    if (count() != 1) detail::fail_io(describe(), " has ", count(), " elements, but one was asked for");
    double value = 0;
    if (detail::with_float_loader(dtype, [&](std::size_t, auto load) { value = static_cast<double>(load(data)); }))
      return value;
    const auto integer = [&]<class T>(T x) {
      std::memcpy(&x, data, sizeof(T));
      return static_cast<double>(x);
    };
    switch (dtype) {
      case io::dtype::i8: return integer(std::int8_t{});
      case io::dtype::u8: return integer(std::uint8_t{});
      case io::dtype::i16: return integer(std::int16_t{});
      case io::dtype::u16: return integer(std::uint16_t{});
      case io::dtype::i32: return integer(std::int32_t{});
      case io::dtype::u32: return integer(std::uint32_t{});
      case io::dtype::i64: return integer(std::int64_t{});
      case io::dtype::u64: return integer(std::uint64_t{});
      default: detail::fail_io(describe(), " has dtype ", name_of(dtype), ", but a number was asked for");
    }
  }

  /// `file: tensor "name"`, for messages.
  std::string describe() const {
    return (source.empty() ? "" : source + ": ") + "tensor " + mlkit::detail::in_quotes(name);
  }

 private:
  template <int Rank>
  extents_t<Rank> extents() const {
    if (rank() != Rank)
      detail::fail_io(describe(), " has shape ", detail::shape_text(shape), " of rank ", rank(), ", but rank ", Rank,
                      " was asked for");
    extents_t<Rank> e{};
    for (int d = 0; d < Rank; ++d) e[static_cast<std::size_t>(d)] = shape[static_cast<std::size_t>(d)];
    return e;
  }
};

/// How to read a safetensors file.
struct safetensors_options {
  bool trailing_bytes = false;  ///< accept bytes after the last tensor, which some published files carry
  bool map = true;              ///< map the file; otherwise read it, so that later changes to the file cannot be seen
};

/// The tensors of one safetensors file. A value: copies share the mapped file, and const use from several threads is
/// safe. The whole header is checked before anything can be asked for; data is touched only when it is used.
class safetensors {
 public:
  safetensors() = default;

  /// Opens and checks a file. Cost: the header's size; data is mapped, not read.
  /// Throws io_error, naming the file, the tensor and both sizes: N above 100,000,000 or beyond the file; a header
  /// that is not strict JSON of the format's form; a name given twice; an unknown dtype; a size that is not the
  /// product of the shape and the width, or does not fit 63 bits; data that overlaps, has gaps, or does not end where
  /// the file ends. While the file is mapped nobody may truncate it (replacing it by rename, as the writer does, is
  /// fine).
  static safetensors open(const std::string& path, const safetensors_options& options = {}) {
    return safetensors(mlkit::detail::load_file(path, options.map), path, options);
  }

  /// The same over bytes in memory, which must outlive what is made from them. `source` names them in messages.
  static safetensors parse(std::span<const std::byte> bytes, const safetensors_options& options = {},
                           const std::string& source = "safetensors") {
    return safetensors(std::make_shared<const mlkit::detail::byte_image>(bytes), source, options);
  }

  /// All tensors, in the order of their data.
  const std::vector<tensor_info>& tensors() const noexcept { return tensors_; }
  auto begin() const noexcept { return tensors_.begin(); }
  auto end() const noexcept { return tensors_.end(); }
  std::size_t size() const noexcept { return tensors_.size(); }

  /// The `__metadata__` of the header.
  const std::map<std::string, std::string>& metadata() const noexcept { return metadata_; }

  /// The file's path, or the name given to parse().
  const std::string& source() const noexcept { return source_; }

  /// The tensor of that name, or null.
  const tensor_info* find(std::string_view name) const noexcept {
    const auto at = std::lower_bound(by_name_.begin(), by_name_.end(), name,
                                     [&](std::size_t i, std::string_view n) { return tensors_[i].name < n; });
    return at != by_name_.end() && tensors_[*at].name == name ? &tensors_[*at] : nullptr;
  }
  bool contains(std::string_view name) const noexcept { return find(name) != nullptr; }

  /// The tensor of that name; throws io_error if there is none.
  const tensor_info& at(std::string_view name) const {
    const tensor_info* info = find(name);
    if (!info) detail::fail_io(source_, ": there is no tensor ", mlkit::detail::in_quotes(name), " among ", size());
    return *info;
  }

  /// at(name).view<T, Rank>()
  template <detail::file_element T, int Rank>
  tensor_view<const T, Rank> view(std::string_view name) const {
    return at(name).view<T, Rank>();
  }
  /// at(name).tensor<T, Rank>()
  template <storage T, int Rank>
  mlkit::tensor<T, Rank> tensor(std::string_view name) const {
    return at(name).tensor<T, Rank>();
  }

 private:
  static constexpr std::uint64_t header_limit = 100'000'000;  // the limit of the format's own reader

  safetensors(const std::shared_ptr<const mlkit::detail::byte_image>& image, const std::string& source,
              const safetensors_options& options)
      : source_(source) {
    const std::span<const std::byte> bytes = image->bytes();
    if (bytes.size() < 8) fail("has ", bytes.size(), " bytes, but the header's length alone takes 8");
    std::uint64_t length = 0;
    std::memcpy(&length, bytes.data(), 8);
    if (length > header_limit) fail("the header's length is ", length, ", above the limit of ", header_limit);
    if (length > bytes.size() - 8)
      fail("the header's length is ", length, ", but only ", bytes.size() - 8, " bytes follow");
    std::vector<index_t> begins;
    read_header({reinterpret_cast<const char*>(bytes.data()) + 8, static_cast<std::size_t>(length)}, begins);
    place(bytes.subspan(8 + static_cast<std::size_t>(length)), begins, options.trailing_bytes);
    for (tensor_info& t : tensors_) {
      t.owner = image;
      t.source = source_;
    }
  }

  template <class... Parts>
  [[noreturn]] void fail(const Parts&... parts) const {
    detail::fail_io(source_, ": ", parts...);
  }

  void read_header(std::string_view text, std::vector<index_t>& begins) {
    mlkit::detail::json_cursor json(text, source_, "header");
    if (text.empty() || text[0] != '{') json.fail("a header begins with '{'");
    bool has_metadata = false;
    json.expect('{');
    for (bool more = !json.take('}'); more; more = next(json)) {
      std::string name = json.string();
      json.expect(':');
      if (name == "__metadata__") {
        if (std::exchange(has_metadata, true)) json.fail("\"__metadata__\" is given twice");
        read_metadata(json);
      } else {
        begins.push_back(read_tensor(json, std::move(name)));
      }
    }
    if (!json.at_end()) json.fail("text follows the header's object");
    sort_names();
  }

  // After a member of an object: whether another follows.
  static bool next(mlkit::detail::json_cursor& json) {
    if (json.take(',')) return true;
    json.expect('}');
    return false;
  }

  void read_metadata(mlkit::detail::json_cursor& json) {
    json.expect('{');
    for (bool more = !json.take('}'); more; more = next(json)) {
      std::string key = json.string();
      json.expect(':');
      std::string value = json.string();
      if (!metadata_.emplace(std::move(key), std::move(value)).second)
        json.fail("a key of \"__metadata__\" is given twice");
    }
  }

  void sort_names() {
    by_name_.resize(tensors_.size());
    for (std::size_t i = 0; i < by_name_.size(); ++i) by_name_[i] = i;
    std::sort(by_name_.begin(), by_name_.end(),
              [&](std::size_t a, std::size_t b) { return tensors_[a].name < tensors_[b].name; });
    for (std::size_t i = 1; i < by_name_.size(); ++i)
      if (tensors_[by_name_[i]].name == tensors_[by_name_[i - 1]].name)
        fail("header: ", tensors_[by_name_[i]].describe(), " is given twice");
  }

  // {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, in any order. Returns where the data begins.
  index_t read_tensor(mlkit::detail::json_cursor& json, std::string name) {
    tensor_info t;
    t.name = std::move(name);
    bool has_dtype = false, has_shape = false, has_offsets = false;
    index_t offsets[2] = {};
    json.expect('{');
    for (bool more = !json.take('}'); more; more = next(json)) {
      const std::string key = json.string();
      json.expect(':');
      bool* const seen = key == "dtype"          ? &has_dtype
                         : key == "shape"        ? &has_shape
                         : key == "data_offsets" ? &has_offsets
                                                 : nullptr;
      if (!seen) json.fail(t.describe(), " has the unknown field ", mlkit::detail::in_quotes(key));
      if (std::exchange(*seen, true)) json.fail(t.describe(), " has the field \"", key, "\" twice");
      if (key == "dtype") {
        const std::string text = json.string();
        const auto* entry = std::find_if(std::begin(detail::dtype_table), std::end(detail::dtype_table),
                                         [&](const detail::dtype_entry& e) { return e.name == text; });
        if (entry == std::end(detail::dtype_table))
          json.fail(t.describe(), " has the unknown dtype ", mlkit::detail::in_quotes(text));
        t.dtype = static_cast<dtype>(entry - detail::dtype_table);
      } else if (key == "shape") {
        json.expect('[');
        if (!json.take(']')) {
          do t.shape.push_back(json.natural());
          while (json.take(','));
          json.expect(']');
        }
      } else {
        json.expect('[');
        offsets[0] = json.natural();
        json.expect(',');
        offsets[1] = json.natural();
        json.expect(']');
      }
    }
    if (!has_dtype || !has_shape || !has_offsets)
      json.fail(t.describe(), " has no ", !has_dtype ? "dtype" : !has_shape ? "shape" : "data_offsets");
    if (offsets[1] < offsets[0])
      json.fail(t.describe(), " ends at byte ", offsets[1], ", before its begin at ", offsets[0]);
    t.bytes = static_cast<std::size_t>(offsets[1] - offsets[0]);
    const index_t size = checked_bytes(t);
    if (size != offsets[1] - offsets[0])
      json.fail(t.describe(), " of shape ", detail::shape_text(t.shape), " and dtype ", name_of(t.dtype), " takes ",
                size, " bytes, but its offsets [", offsets[0], ", ", offsets[1], "] span ", offsets[1] - offsets[0]);
    tensors_.push_back(std::move(t));
    return offsets[0];
  }

  index_t checked_bytes(const tensor_info& t) const {
    index_t elements = 1, spanned = 1;  // spanned counts a zero as one: strides of empty tensors must fit as well
    for (const index_t e : t.shape) {
      if (e > 0 && spanned > INT64_MAX / 64 / e)
        fail("header: ", t.describe(), ": shape ", detail::shape_text(t.shape), " is too large");
      spanned *= std::max<index_t>(e, 1);
      elements *= e;
    }
    const index_t bits = elements * bits_of(t.dtype);
    if (bits % 8 != 0)
      fail("header: ", t.describe(), " of shape ", detail::shape_text(t.shape), " and dtype ", name_of(t.dtype),
           " does not fill whole bytes");
    return bits / 8;
  }

  // Puts the tensors in the order of their data and checks that they cover it exactly.
  void place(std::span<const std::byte> data, const std::vector<index_t>& begins, bool trailing_bytes) {
    std::vector<std::size_t> order(tensors_.size());
    for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
    const auto range = [&](std::size_t i) { return std::pair(begins[i], tensors_[i].bytes); };
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return range(a) < range(b); });
    std::vector<tensor_info> sorted;
    sorted.reserve(order.size());
    std::size_t end = 0;
    for (const std::size_t i : order) {
      tensor_info& t = tensors_[i];
      const auto begin = static_cast<std::size_t>(begins[i]);
      if (begin < end)
        fail(t.describe(), " begins at byte ", begin, ", but the data before it ends at ", end, ": they overlap");
      if (begin > end)
        fail(t.describe(), " begins at byte ", begin, ", but the data before it ends at ", end, ": there is a gap");
      end = begin + t.bytes;
      if (end > data.size()) fail(t.describe(), " ends at byte ", end, ", the data has ", data.size());
      t.data = data.data() + begin;
      sorted.push_back(std::move(t));
    }
    if (end < data.size() && !trailing_bytes)
      fail("the last tensor ends at byte ", end, ", but the data has ", data.size());
    tensors_ = std::move(sorted);
    sort_names();
  }

  std::string source_;
  std::vector<tensor_info> tensors_;
  std::vector<std::size_t> by_name_;
  std::map<std::string, std::string> metadata_;
};

/// safetensors::parse, as a function: for bytes that are already in memory.
inline safetensors parse_safetensors(std::span<const std::byte> bytes, const safetensors_options& options = {}) {
  return safetensors::parse(bytes, options);
}

/// A tensor for the writer: looks at a view or container; elements that are not contiguous are copied.
template <class X>
tensor_info named(std::string name, const X& tensor) {
  const auto v = as_view(tensor);
  using T = typename std::remove_cvref_t<decltype(v)>::value_type;
  mlkit::detail::check_view("io::named", name, v);
  tensor_info t;
  t.name = std::move(name);
  t.dtype = dtype_of<T>();
  t.shape.assign(v.extents.begin(), v.extents.end());
  t.bytes = static_cast<std::size_t>(v.size()) * sizeof(T);
  t.data = reinterpret_cast<const std::byte*>(v.data);
  if (!v.contiguous() && !v.empty()) {
    auto copy = mlkit::detail::make_aligned<std::byte>(static_cast<index_t>(t.bytes));
    auto* to = reinterpret_cast<T*>(copy.get());
    constexpr int rank = std::remove_cvref_t<decltype(v)>::rank;
    extents_t<rank> at{};
    for (index_t i = 0, n = v.size(); i < n; ++i) {
      index_t offset = 0;
      for (int d = 0; d < rank; ++d) offset += at[d] * v.strides[d];
      to[i] = v.data[offset];
      for (int d = rank - 1; d >= 0 && ++at[d] == v.extents[d]; --d) at[d] = 0;
    }
    t.data = copy.get();
    t.owner = std::make_shared<const mlkit::detail::byte_image>(std::move(copy), t.bytes);
  }
  return t;
}

/// A scalar (rank 0) for the writer; it holds its value.
template <detail::file_element T>
tensor_info named_scalar(std::string name, T value) {
  auto copy = mlkit::detail::make_aligned<std::byte>(sizeof(T));
  std::memcpy(copy.get(), &value, sizeof(T));
  tensor_info t;
  t.name = std::move(name);
  t.dtype = dtype_of<T>();
  t.data = copy.get();
  t.bytes = sizeof(T);
  t.owner = std::make_shared<const mlkit::detail::byte_image>(std::move(copy), sizeof(T));
  return t;
}

namespace detail {

// The first 8 + N bytes of a file that holds these tensors, and the order in which their data follows.
inline std::string header_of(const std::vector<tensor_info>& tensors,
                             const std::map<std::string, std::string>& metadata, std::vector<std::size_t>& order) {
  constexpr std::string_view function = "io::write_safetensors";
  for (const auto& [key, value] : metadata)
    if (!is_utf8(key) || !is_utf8(value)) fail_value(function, ": metadata ", in_quotes(key), " is not valid UTF-8");
  order.resize(tensors.size());
  for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::sort(order.begin(), order.end(),
            [&](std::size_t a, std::size_t b) { return tensors[a].name < tensors[b].name; });
  for (std::size_t i = 0; i < order.size(); ++i) {
    const tensor_info& t = tensors[order[i]];
    if (t.name == "__metadata__" || !is_utf8(t.name))
      fail_value(function, ": the name ", in_quotes(t.name), is_utf8(t.name) ? " is reserved" : " is not valid UTF-8");
    if (i > 0 && t.name == tensors[order[i - 1]].name)
      fail_value(function, ": two tensors are named ", in_quotes(t.name));
    index_t spanned = 1, elements = 1;
    for (const index_t e : t.shape) {
      if (e < 0 || (e > 0 && spanned > INT64_MAX / 64 / e))
        fail_shape(function, ": ", t.describe(), ": shape ", shape_text(t.shape), " is negative or too large");
      spanned *= std::max<index_t>(e, 1);
      elements *= e;
    }
    const auto bits = static_cast<std::uint64_t>(elements) * static_cast<std::uint64_t>(bits_of(t.dtype));
    if (bits % 8 != 0 || bits / 8 != t.bytes)
      fail_shape(function, ": ", t.describe(), " of shape ", shape_text(t.shape), " and dtype ", name_of(t.dtype),
                 " takes ", bits / 8, " bytes, but has ", t.bytes);
    if (!t.data && t.bytes > 0) fail_value(function, ": ", t.describe(), " is null, but has ", t.bytes, " bytes");
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](std::size_t a, std::size_t b) { return tensors[a].dtype > tensors[b].dtype; });

  std::string header(8, '\0');
  header += '{';
  if (!metadata.empty()) {
    header += "\"__metadata__\":{";
    for (const auto& [key, value] : metadata) {
      if (header.back() != '{') header += ',';
      append_json_string(header, key);
      header += ':';
      append_json_string(header, value);
    }
    header += '}';
  }
  std::size_t end = 0;
  for (const std::size_t i : order) {
    const tensor_info& t = tensors[i];
    if (header.back() != '{') header += ',';
    append_json_string(header, t.name);
    header += ":{\"dtype\":\"" + std::string(name_of(t.dtype)) + "\",\"shape\":[";
    for (const index_t e : t.shape) header += (header.back() == '[' ? "" : ",") + std::to_string(e);
    header += "],\"data_offsets\":[" + std::to_string(end) + "," + std::to_string(end + t.bytes) + "]}";
    end += t.bytes;
  }
  header += '}';
  header.append((8 - header.size() % 8) % 8, ' ');
  const std::uint64_t length = header.size() - 8;
  if (length > 100'000'000) fail_value(function, ": the header has ", length, " bytes, above the limit of 100000000");
  std::memcpy(header.data(), &length, 8);
  return header;
}

inline void write_tensors(file_replacement& file, const std::string& header, const std::vector<tensor_info>& tensors,
                          const std::vector<std::size_t>& order) {
  file.write(header.data(), header.size());
  for (const std::size_t i : order) file.write(tensors[i].data, tensors[i].bytes);
}

}  // namespace detail

/// Writes a safetensors file: byte for byte what the safetensors package writes (tensors by dtype descending, then by
/// name, so that each is aligned; the header padded with spaces to 8 bytes).
///
/// The file appears whole or not at all: data goes to a temporary name in the same directory, reaches the disk, and is
/// then renamed over `path`; after a crash the old file is still there (and beside it, where the process was killed
/// meanwhile, what was written of `.<name>.<process>.<number>.tmp`). Reading from a file and writing to the same
/// path is safe. Throws value_error or shape_error for names given twice or reserved, text that is not UTF-8 and sizes
/// that do not match, and io_error, with the temporary file removed, where the system refuses.
inline void write_safetensors(const std::string& path, const std::vector<tensor_info>& tensors,
                              const std::map<std::string, std::string>& metadata = {}) {
  std::vector<std::size_t> order;
  const std::string header = detail::header_of(tensors, metadata, order);
  mlkit::detail::file_replacement file(path);
  detail::write_tensors(file, header, tensors, order);
  file.commit();
}

/// The same into memory.
inline std::vector<std::byte> safetensors_bytes(const std::vector<tensor_info>& tensors,
                                                const std::map<std::string, std::string>& metadata = {}) {
  std::vector<std::size_t> order;
  const std::string header = detail::header_of(tensors, metadata, order);
  const auto* begin = reinterpret_cast<const std::byte*>(header.data());
  std::vector<std::byte> bytes(begin, begin + header.size());
  for (const std::size_t i : order) bytes.insert(bytes.end(), tensors[i].data, tensors[i].data + tensors[i].bytes);
  return bytes;
}

}  // namespace MLKIT_NAMESPACE::io
