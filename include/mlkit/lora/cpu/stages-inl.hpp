// The stage of lora/products.hpp on registers.

template <class V, class A, class B, class Out>
MLKIT_ALWAYS_INLINE V finish_stage(set_tag, const lora::detail::finish<A, B, Out>& stage, V x,
                                   const output_position& at) noexcept {
  x = x * V(stage.rows ? stage.value * stage.rows[at.row] : stage.value);
  if (stage.kept) x.store(stage.kept + at.row * stage.kept_row + at.col, at.count);
  if (stage.columns) x = x * V::load(stage.columns + at.col, at.count);
  if (stage.bias) x = x + V::load(stage.bias + at.col, at.count);
  if (stage.row_bias) x = x + V(static_cast<A>(stage.row_bias[at.row]));
  if (stage.add) {
    const Out* add = stage.add + at.row * stage.add_row + at.col * stage.add_column;
    if (stage.add_column == 1) {
      x = x + V::load(add, at.count);
    } else {
      A lanes[V::width] = {};
      for (int i = 0; i < at.count; ++i) lanes[i] = static_cast<A>(add[i * stage.add_column]);
      x = x + V::load(lanes);
    }
  }
  return stage.last ? x * V(stage.last[at.row]) : x;
}

template <class V, class W, class I, class A>
MLKIT_ALWAYS_INLINE V finish_stage(set_tag, const lora::detail::add_token_rows<W, I, A>& stage, V x,
                                   const output_position& at) noexcept {
  const W* w =
      stage.w.data + static_cast<index_t>(stage.ids[at.row]) * stage.w.strides[0] + at.col * stage.w.strides[1];
  if (stage.w.strides[1] == 1) {
    x = x + V::load(w, at.count);
  } else {
    A lanes[V::width] = {};
    for (int i = 0; i < at.count; ++i) lanes[i] = static_cast<A>(w[i * stage.w.strides[1]]);
    x = x + V::load(lanes);
  }
  return stage.factors ? x * V::load(stage.factors + at.col, at.count) : x;
}
