// Multi-head attention between values on a tape.
#pragma once

#include "../attention/backward.hpp"
#include "../attention/forward.hpp"
#include "elementwise.hpp"
#include "tape.hpp"

namespace MLKIT_NAMESPACE::nn {
namespace detail {

// x [batch, tokens, heads * d] as [batch, heads, tokens, d], in place.
template <class T>
tensor_view<T, 4> heads_of(T* data, const shape& s, index_t heads) noexcept {
  const index_t d = s[2] / heads;
  return {data, {s[0], heads, s[1], d}, {s[1] * s[2], d, s[2], 1}};
}

// The heads of k and v, where q's are as many; throws shape_error where columns are no whole heads.
template <class T>
index_t kv_heads_of(std::string_view name, const var<T>& q, const var<T>& k, const var<T>& v, index_t heads) {
  const auto check = [&](std::string_view what, const var<T>& x) {
    if (x.shape().rank() != 3)
      fail_shape(name, ": ", what, " has shape ", x.shape().text(), ", but must be [batch, tokens, columns]");
  };
  check("q", q), check("k", k), check("v", v);
  if (heads < 1 || q.columns() % heads || q.columns() == 0)
    fail_shape(name, ": ", heads, " heads do not divide the ", q.columns(), " columns of q");
  const index_t d = q.columns() / heads, kv_heads = k.columns() / d;
  if (kv_heads < 1 || k.columns() % d)
    fail_shape(name, ": k has ", k.columns(), " columns, which are not whole heads of ", d);
  if (v.columns() % kv_heads) fail_shape(name, ": v has ", v.columns(), " columns, but k has ", kv_heads, " heads");
  return kv_heads;
}

}  // namespace detail

/// softmax(scores(q k^T)) v in each of `heads` heads, which lie side by side in the columns: q [batch, queries,
/// heads * d], k [batch, keys, kv heads * d], v [batch, keys, kv heads * d_v], result [batch, queries, heads * d_v].
/// Without stages scores are q . k / sqrt(d). Fewer kv heads than heads are grouped queries: their number is k's
/// columns over d.
///
///     nn::multi_head_attention(q, k, v, 4, attention::scores{attention::key_lengths{lengths}})
///
/// Heads are read through strides, nothing of queries x keys is stored, and backward computes the probabilities again.
/// What the stages refer to must stay as it is until backward, and gets no gradient. Throws shape_error where extents
/// do not fit. See attention::forward. Vaswani et al.: "Attention is all you need", 2017, section 3.2.
template <real T, class... Stages>
var<T> multi_head_attention(var<T> q, var<T> k, var<T> v, index_t heads,
                            const attention::scores<Stages...>& stages = {}) {
  constexpr std::string_view name = "nn::multi_head_attention";
  const index_t kv_heads = detail::kv_heads_of(name, q, k, v, heads);
  tape<T>& t = q.on();
  const index_t batch = q.shape()[0], queries = q.shape()[1];
  const var<T> y = t.make({batch, queries, heads * (v.columns() / kv_heads)}, {q, k, v});
  const tensor_view<T, 3> lse(t.scratch(batch * heads * queries), {batch, heads, queries});
  const auto of = [=](const var<T>& x, T* data, index_t count) { return detail::heads_of(data, x.shape(), count); };
  attention::forward(t.exec(), of(q, q.data(), heads), of(k, k.data(), kv_heads), of(v, v.data(), kv_heads), stages,
                     of(y, y.data(), heads), lse);
  t.on_backward(y, [=] {
    tape<T>& on = y.on();
    // A gradient is written where none has arrived, and else added from scratch memory; one that nobody wants stays
    // there.
    const var<T> inputs[] = {q, k, v};
    T *to[3], *fresh[3];
    for (int i = 0; i < 3; ++i) {
      fresh[i] = inputs[i].needs_grad() ? inputs[i].fresh_grad() : nullptr;
      to[i] = fresh[i] ? fresh[i] : on.scratch(inputs[i].size());
    }
    attention::backward(on.exec(), of(q, q.data(), heads), of(k, k.data(), kv_heads), of(v, v.data(), kv_heads), stages,
                        of(y, y.data(), heads), lse, of(y, y.grad_data(), heads),
                        attention::gradients{of(q, to[0], heads), of(k, to[1], kv_heads), of(v, to[2], kv_heads)});
    for (int i = 0; i < 3; ++i) {
      if (fresh[i] || !inputs[i].needs_grad()) continue;
      detail::for_each(on.exec(), inputs[i].size(),
                       [sum = inputs[i].grad_data(), d = to[i]](index_t j) { sum[j] += d[j]; });
    }
  });
  return y;
}

}  // namespace MLKIT_NAMESPACE::nn
