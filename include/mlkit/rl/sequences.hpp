// Where the sequences of a batch lie: rows, or parts of packed tokens.
#pragma once

#include "../core/starts.hpp"
#include "mask.hpp"

namespace MLKIT_NAMESPACE::rl::detail {

// Starts of packed sequences, or of groups, among the elements of `of`.
inline void check_sequence_starts(arguments& call, std::string_view function, std::string_view name,
                                  const vector_view<const std::int32_t>& starts, std::string_view of, index_t tokens) {
  mlkit::detail::check_starts(function, name, starts, message(of, " has"), tokens, "elements");
  call.reads(name, starts);
}

/// The tokens of sequence b: `count` of them, the first in column `begin` of row `row`.
struct sequence_place {
  index_t row, begin, count;
};

/// [batch, time], or the [tokens] of packed sequences, which are one row.
struct sequence_places {
  index_t sequences = 0, time = 0;
  vector_view<const std::int32_t> starts = {};

  sequence_place operator()(index_t b) const noexcept {
    if (!starts.data) return {b, 0, time};
    return {0, starts(b), starts(b + 1) - starts(b)};
  }
};

template <class T>
sequence_places check_sequences(arguments& call, std::string_view function, const tensor_view<T, 2>& tokens,
                                std::string_view, const vector_view<const std::int32_t>& starts) {
  if (starts.data || starts.extent(0) > 0)
    fail_shape(function, ": cu_seqlens go with packed tokens [tokens], not with [batch, time]");
  (void)call;
  return {tokens.extent(0), tokens.extent(1)};
}
template <class T>
sequence_places check_sequences(arguments& call, std::string_view function, const tensor_view<T, 1>& tokens,
                                std::string_view name, const vector_view<const std::int32_t>& starts) {
  check_sequence_starts(call, function, "cu_seqlens", starts, name, tokens.extent(0));
  return {starts.extent(0) - 1, 0, starts};
}

// Element `col` of row `row` of a view of rank 2, or of one of rank 1, which is one row.
template <class T>
T& token(const tensor_view<T, 1>& v, index_t, index_t col) noexcept {
  return v(col);
}
template <class T>
T& token(const tensor_view<T, 2>& v, index_t row, index_t col) noexcept {
  return v(row, col);
}

template <class T>
plane<T> sequence_plane(const tensor_view<T, 1>& v) noexcept {
  return {v.data, 0, v.strides[0]};
}
template <class T>
plane<T> sequence_plane(const tensor_view<T, 2>& v) noexcept {
  return {v.data, v.strides[0], v.strides[1]};
}

}  // namespace MLKIT_NAMESPACE::rl::detail
