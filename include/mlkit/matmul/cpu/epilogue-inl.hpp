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

// n elements, `step` apart.
template <class V, class Out>
MLKIT_ALWAYS_INLINE V load_run(const Out* p, index_t step, int n) noexcept {
  if (step == 1) return V::load(p, n);
  typename V::value_type lanes[V::width] = {};
  for (int l = 0; l < n; ++l) lanes[l] = static_cast<typename V::value_type>(p[l * step]);
  return V::load(lanes);
}

template <class V, class Stage>
MLKIT_ALWAYS_INLINE V apply_stage(const Stage& stage, V x, const output_position& at) noexcept {
  if constexpr (requires { finish_stage(set_tag{}, stage, x, at); }) {
    return finish_stage(set_tag{}, stage, x, at);
  } else {
    using sum = typename V::value_type;
    sum lanes[V::width];
    x.store(lanes);
    for (int l = 0; l < at.count; ++l) {
      if constexpr (std::is_invocable_v<const Stage&, sum, index_t, index_t>)
        lanes[l] = static_cast<sum>(stage(lanes[l], at.row, at.col + l));
      else
        lanes[l] = static_cast<sum>(stage(lanes[l]));
    }
    return V::load(lanes);
  }
}

// Sends sums through the epilogue into c[row, col .. col + count). Reads them in whole vectors, up to a vector past the
// last.
template <class Sum, class Out, class Epilogue>
MLKIT_ALWAYS_INLINE void finish_run(const output<Out, Epilogue>& to, index_t row, index_t col, index_t count,
                                    const Sum* sums) noexcept {
  using V = vec<Sum>;
  Out* out = to.c + row * to.row_stride + col * to.col_stride;
  for (index_t j = 0; j < count; j += V::width) {
    const int n = static_cast<int>(std::min<index_t>(V::width, count - j));
    V x = n == V::width ? V::load(sums + j) : V::load(sums + j, n);
    const output_position at{row, col + j, n};
    const auto step = [&](const auto& stage) {
      if constexpr (std::is_same_v<std::remove_cvref_t<decltype(stage)>, accumulate>)
        x = x + load_run<V>(out + j * to.col_stride, to.col_stride, n);
      else
        x = apply_stage(stage, x, at);
    };
    to.epilogue->stages.apply([&](const auto&... stage) { (step(stage), ...); });
    if (to.col_stride == 1 && n == V::width) {
      x.store(out + j);
    } else if (to.col_stride == 1) {
      x.store(out + j, n);
    } else {
      Sum lanes[V::width];
      x.store(lanes);
      for (int l = 0; l < n; ++l) out[(j + l) * to.col_stride] = static_cast<Out>(lanes[l]);
    }
  }
}
