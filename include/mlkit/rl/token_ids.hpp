// Token ids of a batch: 32 or 64 bits, any strides, checked against the vocabulary before anything is written.
#pragma once

#include "mask.hpp"

namespace MLKIT_NAMESPACE::rl {

/// Token ids, [rows] or [batch, time]: a view of std::int32_t or std::int64_t with any strides, or, of rank 1, a
/// contiguous container of them. It owns nothing.
template <int Rank>
class token_ids {
 public:
  token_ids() = default;
  template <std::signed_integral I>
    requires(sizeof(I) == 4 || sizeof(I) == 8)
  token_ids(const tensor_view<const I, Rank>& v)
  noexcept { set(v); }
  template <std::signed_integral I>
    requires(sizeof(I) == 4 || sizeof(I) == 8)
  token_ids(const tensor_view<I, Rank>& v)
  noexcept { set(tensor_view<const I, Rank>(v)); }
  template <std::ranges::contiguous_range R>
    requires(Rank == 1 && std::signed_integral<std::ranges::range_value_t<R>> &&
             (sizeof(std::ranges::range_value_t<R>) == 4 || sizeof(std::ranges::range_value_t<R>) == 8))
  token_ids(const R& r)
  noexcept {
    set(tensor_view<const std::ranges::range_value_t<R>, 1>(std::ranges::data(r),
                                                            {static_cast<index_t>(std::ranges::size(r))}));
  }

  const extents_t<Rank>& extents() const noexcept { return narrow_.extents; }

  /// The id at the given indices, unchecked.
  template <std::convertible_to<index_t>... I>
    requires(sizeof...(I) == Rank)
  index_t operator()(I... indices) const noexcept {
    return wide_.data ? static_cast<index_t>(wide_(indices...)) : static_cast<index_t>(narrow_(indices...));
  }

  /// Calls f with the view that this was made from: of const std::int32_t or const std::int64_t.
  template <class F>
  decltype(auto) visit(F&& f) const {
    return wide_.data ? f(wide_) : f(narrow_);
  }

 private:
  template <class I>
  void set(const tensor_view<const I, Rank>& v) noexcept {
    narrow_.extents = v.extents;
    if constexpr (sizeof(I) == 8) {
      wide_ = {reinterpret_cast<const std::int64_t*>(v.data), v.extents, v.strides};
    } else {
      narrow_ = {reinterpret_cast<const std::int32_t*>(v.data), v.extents, v.strides};
    }
  }

  tensor_view<const std::int32_t, Rank> narrow_;  // or its extents alone
  tensor_view<const std::int64_t, Rank> wide_;
};

namespace detail {

// An element of a batch, for messages: tokens[3], or tokens[1, 3].
template <int Rank>
std::string index_text(std::string_view name, index_t row, const extents_t<Rank>& shape) {
  if constexpr (Rank == 1)
    return message(name, "[", row, "]");
  else
    return message(name, "[", row / shape[1], ", ", row % shape[1], "]");
}

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl
