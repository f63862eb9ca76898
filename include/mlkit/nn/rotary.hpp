// Rotary position embedding between values on a tape.
#pragma once

#include "../attention/rotary.hpp"
#include "attention.hpp"

namespace MLKIT_NAMESPACE::nn {

/// Each head of x [batch, tokens, heads * d] turned by the angles of its token's position: token t of every sequence is
/// at position t, or, where `positions` is given, at positions[t] or positions[sequence * tokens + t]. The table is
/// referred to until backward, positions are copied. See attention::rotate. Throws shape_error where the table or
/// positions do not fit, value_error for a position that the table has not.
template <real T>
var<T> rotate(var<T> x, index_t heads, const attention::rotary_table<T>& table,
              std::span<const std::int32_t> positions = {}) {
  constexpr std::string_view name = "nn::rotate";
  if (x.shape().rank() != 3)
    detail::fail_shape(name, ": x has shape ", x.shape().text(), ", but must be [batch, tokens, columns]");
  if (heads < 1 || x.columns() % heads || x.columns() == 0)
    detail::fail_shape(name, ": ", heads, " heads do not divide the ", x.columns(), " columns of x");
  const index_t tokens = x.shape()[1], count = static_cast<index_t>(positions.size());
  if (!positions.empty() && count != tokens && count != x.rows())
    detail::fail_shape(name, ": positions has ", count, " elements, but x has shape ", x.shape().text());
  tape<T>& t = x.on();
  attention::rotation how;
  if (!positions.empty()) {
    auto* kept = t.template scratch_of<std::int32_t>(count);
    std::copy(positions.begin(), positions.end(), kept);
    how.positions = {kept, {count / tokens, tokens}};
  }
  const var<T> y = t.make(x.shape(), {x});
  attention::rotate(t.exec(), detail::heads_of(x.data(), x.shape(), heads), table,
                    detail::heads_of(y.data(), x.shape(), heads), how);
  t.on_backward(y, [x, y, heads, how, table = &table]() mutable {
    tape<T>& on = y.on();
    how.back = true;
    T* const fresh = x.fresh_grad();
    T* const to = fresh ? fresh : on.scratch(x.size());
    attention::rotate(on.exec(), detail::heads_of(y.grad_data(), x.shape(), heads), *table,
                      detail::heads_of(to, x.shape(), heads), how);
    if (!fresh) detail::for_each(on.exec(), x.size(), [sum = x.grad_data(), to](index_t i) { sum[i] += to[i]; });
  });
  return y;
}

}  // namespace MLKIT_NAMESPACE::nn
