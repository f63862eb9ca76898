// Prompt-to-Prompt editing between values on a tape that does not record. Apart from nn.hpp.
#pragma once

#include "../attention/edit.hpp"
#include "attention.hpp"

namespace MLKIT_NAMESPACE::nn {
namespace detail {

// run(q, k, v, out) over heads that lie side by side in the columns.
template <class T, class Run>
var<T> edited_attention(std::string_view name, var<T> q, var<T> k, var<T> v, index_t heads, const Run& run) {
  const index_t kv_heads = kv_heads_of(name, q, k, v, heads);
  const var<T> y = q.on().make({q.shape()[0], q.shape()[1], heads * (v.columns() / kv_heads)}, {q, k, v});
  if (y.needs_grad()) fail_value(name, ": edited attention has no gradient; its tape must not record");
  const auto of = [](const var<T>& x, index_t count) { return heads_of(x.data(), x.shape(), count); };
  run(of(q, heads), of(k, kv_heads), of(v, kv_heads), of(y, heads));
  return y;
}

}  // namespace detail

/// multi_head_attention to words, edited as the plan says in this step: q [batch, queries, heads * d], k and v [batch,
/// words, ...], of a batch [unedited..., source, edit, ...]. Attention to the words of `blend`, if there is one, is
/// added to it. Throws value_error where the tape records. See attention::edited_cross.
template <real T, class... Stages>
var<T> edited_cross_attention(var<T> q, var<T> k, var<T> v, index_t heads, const attention::scores<Stages...>& stages,
                              const attention::edit_plan& plan, index_t step, attention::local_blend* blend = nullptr) {
  return detail::edited_attention(
      "nn::edited_cross_attention", q, k, v, heads,
      [&](const auto& from, const auto& keys, const auto& values, const auto& to) {
        if (blend)
          attention::edited_cross(q.on().exec(), from, keys, values, stages, plan, step, to, *blend);
        else
          attention::edited_cross(q.on().exec(), from, keys, values, stages, plan, step, to);
      });
}

/// The same for self-attention: see attention::edited_self.
template <real T, class... Stages>
var<T> edited_self_attention(var<T> q, var<T> k, var<T> v, index_t heads, const attention::scores<Stages...>& stages,
                             const attention::edit_plan& plan, index_t step) {
  return detail::edited_attention("nn::edited_self_attention", q, k, v, heads,
                                  [&](const auto& from, const auto& keys, const auto& values, const auto& to) {
                                    attention::edited_self(q.on().exec(), from, keys, values, stages, plan, step, to);
                                  });
}

}  // namespace MLKIT_NAMESPACE::nn
