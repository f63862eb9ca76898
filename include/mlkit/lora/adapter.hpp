// Adapters: the low-rank halves A and B, their scale, and how they start.
#pragma once

#include <cmath>
#include <string_view>
#include <type_traits>

#include "../core/random.hpp"
#include "../core/tensor.hpp"

namespace MLKIT_NAMESPACE::lora {

/// A low-rank update of a weight, delta W = scale B A: a [rank, in], b [out, rank]. It owns nothing.
template <storage T>
struct adapter_view {
  using value_type = T;
  matrix_view<const T> a;
  matrix_view<const T> b;
  double scale = 1;

  index_t rank() const noexcept { return a.extent(0); }
  index_t inputs() const noexcept { return a.extent(1); }
  index_t outputs() const noexcept { return b.extent(0); }
  /// The same update, `weight` times as strong.
  adapter_view scaled(double weight) const noexcept { return {a, b, scale * weight}; }
};

/// An adapter that owns its halves: a [rank, in], b [out, rank]. Its scale is alpha / rank, or alpha / sqrt(rank) with
/// `rs` (Kalajdzievski: "A rank stabilization scaling factor for fine-tuning with LoRA", 2023). A value: swapping
/// adapters is passing another one.
template <storage T>
struct adapter {
  using value_type = T;
  matrix<T> a;
  matrix<T> b;
  double alpha = 1;
  bool rs = false;

  index_t rank() const noexcept { return a.extent(0); }
  index_t inputs() const noexcept { return a.extent(1); }
  index_t outputs() const noexcept { return b.extent(0); }
  double scale() const noexcept {
    const double r = static_cast<double>(rank());
    return alpha / (rs ? std::sqrt(r) : r);
  }
  operator adapter_view<T>() const noexcept { return {a.view(), b.view(), scale()}; }
};

namespace detail {

using namespace mlkit::detail;

template <class A>
inline constexpr bool is_adapter = false;
template <class T>
inline constexpr bool is_adapter<adapter<T>> = true;
template <class T>
inline constexpr bool is_adapter<adapter_view<T>> = true;

// Refuses halves that do not belong together, rank 0 and a scale that is not finite.
template <class T>
void check_adapter(std::string_view function, const adapter_view<T>& p, std::string_view name = "adapter") {
  check_view(function, message(name, ".a"), p.a);
  check_view(function, message(name, ".b"), p.b);
  if (p.rank() == 0) fail_shape(function, ": ", name, " has rank 0; an adapter has rank 1 or more");
  if (p.b.extent(1) != p.rank())
    fail_shape(function, ": ", name, ".b has ", p.b.extent(1), " columns, but ", name, ".a has ", p.rank(), " rows");
  if (!std::isfinite(static_cast<accumulator_t<T>>(p.scale)))
    fail_value(function, ": ", name, " has scale ", p.scale, ", which is not finite",
               std::isfinite(p.scale) ? " in f32" : "");
}

// check_adapter, and that the adapter fits a weight [outputs, inputs].
template <class T>
void check_adapter(std::string_view function, const adapter_view<T>& p, index_t outputs, index_t inputs,
                   std::string_view name = "adapter") {
  check_adapter(function, p, name);
  check_extent(function, message(name, ".a"), "columns", p.inputs(), "base", inputs);
  check_extent(function, message(name, ".b"), "rows", p.outputs(), "base", outputs);
}

}  // namespace detail

/// An adapter, owned or seen.
template <class A>
concept plain_adapter = detail::is_adapter<std::remove_cvref_t<A>>;

template <class T>
adapter_view<T> as_adapter(const adapter<T>& p) noexcept {
  return p;
}
template <class T>
adapter_view<T> as_adapter(const adapter_view<T>& p) noexcept {
  return p;
}

/// How A starts (and B of an embedding adapter is always N(0, 1), as in PEFT).
enum class init {
  kaiming,   ///< uniform in +-1/sqrt(in): Kaiming with a = sqrt(5), PEFT's default
  gaussian,  ///< N(0, (1/rank)^2)
};

/// What make_adapter makes.
struct adapter_options {
  index_t in = 0;   ///< columns of the weight; for an embedding, the number of tokens
  index_t out = 0;  ///< rows of the weight; for an embedding, its width
  index_t rank = 8;
  double alpha = 8;          ///< the update is scaled by alpha / rank
  std::uint64_t seed = 0;    ///< the same seed and stream give the same adapter
  std::uint64_t stream = 0;  ///< one for each layer
  bool rs = false;           ///< scale by alpha / sqrt(rank) instead: rsLoRA
  lora::init init = init::kaiming;
  bool embedding = false;  ///< A starts at zero and B at random, as embedding adapters do
};

/// A fresh adapter whose update is zero: A random and B zero (an embedding's the other way round). Hu et al.: "LoRA:
/// low-rank adaptation of large language models", 2021, section 4.1.
/// Throws shape_error for a rank or size that is not positive, value_error for an alpha that is not finite.
template <storage T>
adapter<T> make_adapter(const adapter_options& o) {
  constexpr std::string_view function = "lora::make_adapter";
  if (o.in < 1) detail::fail_shape(function, ": in = ", o.in, " is not positive");
  if (o.out < 1) detail::fail_shape(function, ": out = ", o.out, " is not positive");
  if (o.rank < 1) detail::fail_shape(function, ": rank = ", o.rank, " is not positive");
  if (!std::isfinite(o.alpha)) detail::fail_value(function, ": alpha = ", o.alpha, " is not finite");
  adapter<T> p{matrix<T>({o.rank, o.in}), matrix<T>({o.out, o.rank}), o.alpha, o.rs};
  const random_stream random{o.seed, o.stream};
  matrix<T>& start = o.embedding ? p.b : p.a;
  const float deviation = o.embedding ? 1.0f : 1.0f / static_cast<float>(o.rank);
  const float bound = 1.0f / std::sqrt(static_cast<float>(o.in));
  for (index_t i = 0; i < start.size(); ++i) {
    const auto at = static_cast<std::uint64_t>(i);
    const float x = o.embedding || o.init == init::gaussian ? deviation * random.normal(at)
                                                            : bound * (2.0f * random.uniform(at) - 1.0f);
    start.data()[i] = static_cast<T>(x);
  }
  return p;
}

}  // namespace MLKIT_NAMESPACE::lora
