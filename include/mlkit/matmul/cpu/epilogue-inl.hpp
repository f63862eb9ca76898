// mlkit's own stages on registers. Other headers add overloads for theirs, found through the tag; they stand in bodies
// like this one, since a function defined outside the region of an instruction set cannot hold its registers.

template <class V, class T>
MLKIT_ALWAYS_INLINE V finish_stage(set_tag, const add_bias<T>& stage, V x, const output_position& at) noexcept {
  return x + V::load(stage.bias.data + at.col, at.count);
}
template <class V, class T>
MLKIT_ALWAYS_INLINE V finish_stage(set_tag, const scale_columns<T>& stage, V x, const output_position& at) noexcept {
  return x * V::load(stage.factors.data + at.col, at.count);
}
template <class V, class T>
MLKIT_ALWAYS_INLINE V finish_stage(set_tag, const scale_rows<T>& stage, V x, const output_position& at) noexcept {
  return x * V(static_cast<typename V::value_type>(stage.factors.data[at.row]));
}
template <class V, class T>
MLKIT_ALWAYS_INLINE V finish_stage(set_tag, const add<T>& stage, V x, const output_position& at) noexcept {
  const matrix_view<const T>& r = stage.residual;
  return x + V::load(r.data + at.row * r.strides[0] + at.col, at.count);
}
template <class V, vectorizable F>
MLKIT_ALWAYS_INLINE V finish_stage(set_tag, const F& f, V x, const output_position&) noexcept {
  return evaluate(f, x);
}
