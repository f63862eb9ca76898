// Score stages on registers: forward, and the gradient through each.

// Where a register of scores stands: lane l is query i + l against key j, and `count` lanes are queries: none where
// that is not positive, and the last query is lane count - 1 still.
struct score_run {
  index_t b, h, i, j;
  int count;
  const void* bias = nullptr;  // the lanes' elements of a bias, in the type of sums, where they were turned beforehand
};

// The first n lanes: all of them for n >= width, none for n <= 0.
template <class V>
MLKIT_ALWAYS_INLINE typename V::native_int first_lanes(index_t n) noexcept {
  using I = typename V::int_type;
  typename V::native_int lane{};
  MLKIT_UNROLL
  for (int l = 0; l < V::width; ++l) lane[l] = static_cast<I>(l);
  return lane < (typename V::native_int{} + static_cast<I>(std::clamp<index_t>(n, 0, V::width)));
}

template <class V>
MLKIT_ALWAYS_INLINE V minus_infinity() noexcept {
  return V(-math_table<typename V::value_type>::infinity);
}

// What a stage makes of scores.
template <class V>
MLKIT_ALWAYS_INLINE V score(set_tag, const attention::scale& stage, V s, const attention::detail::score_shape&,
                            const score_run&) noexcept {
  return s * static_cast<typename V::value_type>(stage.value);
}
template <class V>
MLKIT_ALWAYS_INLINE V score(set_tag, const attention::softcap& stage, V s, const attention::detail::score_shape&,
                            const score_run&) noexcept {
  using A = typename V::value_type;
  return static_cast<A>(stage.cap) * tanh(s * static_cast<A>(1 / stage.cap));
}
template <class V, class T>
MLKIT_ALWAYS_INLINE V score(set_tag, const attention::alibi<T>& stage, V s, const attention::detail::score_shape& shape,
                            const score_run& at) noexcept {
  using A = typename V::value_type;
  V distance;
  const A first = static_cast<A>(at.i + shape.keys - shape.queries - at.j);
  MLKIT_UNROLL
  for (int l = 0; l < V::width; ++l) distance.v[l] = static_cast<A>(l);
  const A slope = static_cast<A>(stage.slopes.data[at.h * stage.slopes.strides[0]]);
  return s - slope * abs(distance + first);
}
template <class V, class T>
MLKIT_ALWAYS_INLINE V score(set_tag, const attention::bias<T>& stage, V s, const attention::detail::score_shape&,
                            const score_run& at) noexcept {
  using A = typename V::value_type;
  const auto& v = stage.values;
  if (v.strides[2] != 0) return s + V::load(static_cast<const A*>(at.bias));
  return s + V(static_cast<A>(v.data[at.b * v.strides[0] + at.h * v.strides[1] + at.j * v.strides[3]]));
}
// Masks that are runs of queries.
template <class V, attention::detail::mask_stage M>
  requires requires(const M& m, const attention::detail::score_shape& s) { m.queries(s, index_t{}); }
MLKIT_ALWAYS_INLINE V score(set_tag, const M& stage, V s, const attention::detail::score_shape& shape,
                            const score_run& at) noexcept {
  const auto run = stage.queries(shape, at.j);
  s = V::select(first_lanes<V>(run.second - at.i), s, minus_infinity<V>());
  return V::select(first_lanes<V>(run.first - at.i), minus_infinity<V>(), s);
}
// Masks that answer for each score.
template <class V, attention::detail::mask_stage M>
  requires requires(const M& m) { m.at(index_t{}, index_t{}, index_t{}, index_t{}); }
MLKIT_ALWAYS_INLINE V score(set_tag, const M& stage, V s, const attention::detail::score_shape&,
                            const score_run& at) noexcept {
  using A = typename V::value_type;
  A lanes[V::width];
  s.store(lanes);
  for (int l = 0; l < at.count; ++l)
    if (!stage.at(at.b, at.h, at.i + l, at.j)) lanes[l] = -math_table<A>::infinity;
  return V::load(lanes);
}
// The user's stages are asked about queries alone: lanes beyond the last one see its position, and keep their scores,
// which are finite, whatever a stage would make of them: backward multiplies what comes of them by zero.
template <class V, attention::detail::user_stage F>
MLKIT_ALWAYS_INLINE V score(set_tag, const F& f, V s, const attention::detail::score_shape&,
                            const score_run& at) noexcept {
  using A = typename V::value_type;
  A lanes[V::width];
  s.store(lanes);
  MLKIT_SIMD
  for (int l = 0; l < V::width; ++l) {
    if constexpr (std::is_invocable_v<const F&, A, const attention::position&>)
      lanes[l] = static_cast<A>(f(lanes[l], attention::position{at.b, at.h, at.i + std::min(l, at.count - 1), at.j}));
    else
      lanes[l] = static_cast<A>(f(lanes[l]));
  }
  const V changed = V::load(lanes);
  return at.count < V::width ? V::select(first_lanes<V>(at.count), changed, s) : changed;
}
// What is of the softmax changes no score.
template <class V, class S>
  requires(attention::detail::is_of_softmax<S>)
MLKIT_ALWAYS_INLINE V score(set_tag, const S&, V s, const attention::detail::score_shape&, const score_run&)
noexcept { return s; }

// The gradient at a stage's input, from that at its output: g d(out) / d(in), where s is the input and out the output.
template <class V, class S>
MLKIT_ALWAYS_INLINE V score_gradient(set_tag, const S& stage, V s, V out, V g, const score_run& at) noexcept {
  using A = typename V::value_type;
  if constexpr (attention::detail::is_scale<S>) {
    return g * static_cast<A>(stage.value);
  } else if constexpr (std::is_same_v<S, attention::softcap>) {
    // What is masked has no gradient, whatever the score there.
    const V t = out * static_cast<A>(1 / stage.cap);
    return V::select(g == V::zero(), g, g * (A(1) - t * t));
  } else if constexpr (attention::detail::user_stage<S>) {
    A scores[V::width], lanes[V::width];
    s.store(scores);
    MLKIT_SIMD
    for (int l = 0; l < V::width; ++l) {
      if constexpr (requires(A x, const attention::position& p) { stage.derivative(x, p); })
        lanes[l] = static_cast<A>(
            stage.derivative(scores[l], attention::position{at.b, at.h, at.i + std::min(l, at.count - 1), at.j}));
      else
        lanes[l] = static_cast<A>(stage.derivative(scores[l]));
    }
    // What is masked has no gradient, whatever the derivative there.
    return V::select(g == V::zero(), g, g * V::load(lanes));
  } else {
    return g;
  }
}

// What the masks leave of a score, from stage I on. Masks say which scores count: they come after all that changes
// scores, wherever they are declared, so that no softcap or scale makes a number of -inf.
template <int I = 0, class V, class... Stages>
MLKIT_ALWAYS_INLINE V masked_score(const attention::scores<Stages...>& pipeline, V s,
                                   const attention::detail::score_shape& shape, const score_run& at) noexcept {
  if constexpr (I < static_cast<int>(sizeof...(Stages))) {
    const auto& stage = std::get<I>(pipeline.stages);
    if constexpr (attention::detail::mask_stage<std::remove_cvref_t<decltype(stage)>>)
      s = score(set_tag{}, stage, s, shape, at);
    return masked_score<I + 1>(pipeline, s, shape, at);
  } else {
    return s;
  }
}

// All stages from I on, in order; then the masks, unless the block is full.
template <bool Masked, int I = 0, class V, class... Stages>
MLKIT_ALWAYS_INLINE V all_scores(const attention::scores<Stages...>& pipeline, V s,
                                 const attention::detail::score_shape& shape, const score_run& at) noexcept {
  if constexpr (I < static_cast<int>(sizeof...(Stages))) {
    const auto& stage = std::get<I>(pipeline.stages);
    if constexpr (!attention::detail::mask_stage<std::remove_cvref_t<decltype(stage)>>)
      s = score(set_tag{}, stage, s, shape, at);
    return all_scores<Masked, I + 1>(pipeline, s, shape, at);
  } else if constexpr (Masked) {
    return masked_score(pipeline, s, shape, at);
  } else {
    return s;
  }
}

// The gradient at the input of stage I, where s is that input: `last` gives the gradient at the end of the pipeline
// for the score that comes out of it, `see` is called with each stage, and the gradient at its output.
template <bool Masked, int I = 0, class V, class Last, class See, class... Stages>
MLKIT_ALWAYS_INLINE V all_gradients(const attention::scores<Stages...>& pipeline, V s,
                                    const attention::detail::score_shape& shape, const score_run& at, Last&& last,
                                    See&& see) noexcept {
  if constexpr (I < static_cast<int>(sizeof...(Stages))) {
    const auto& stage = std::get<I>(pipeline.stages);
    if constexpr (attention::detail::mask_stage<std::remove_cvref_t<decltype(stage)>>) {
      return all_gradients<Masked, I + 1>(pipeline, s, shape, at, last, see);
    } else {
      const V out = score(set_tag{}, stage, s, shape, at);
      const V g = all_gradients<Masked, I + 1>(pipeline, out, shape, at, last, see);
      see(stage, g);
      return score_gradient(set_tag{}, stage, s, out, g, at);
    }
  } else if constexpr (Masked) {
    return last(masked_score(pipeline, s, shape, at));
  } else {
    return last(s);
  }
}

// 2^x within 1.5 units in the last place for x <= 8; 0 from where the result is no longer normal, be it that subnormals
// are flushed anyhow. f64: simd/math.hpp's.
template <bool Flushed = true, class V>
MLKIT_ALWAYS_INLINE V exp2_bounded(V x) noexcept {
  if constexpr (sizeof(typename V::value_type) == 8) {
    return exp2(x);
  } else {
    // Minimax fit of (2^f - 1) / f for |f| <= 1/2, of the error relative to 2^f.
    constexpr float fit[] = {0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba16p-10f};
#if MLKIT_SET_AVX512
    const V n = typename V::native(_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    const V f = x - n;
    const V y = fma(horner(f, fit), f, V(1.0f));
    // Subnormal factors would cost a product on Intel a hundred times its time.
    const __mmask16 normal = Flushed ? 0xffff : _mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-126.5f), _CMP_NLE_UQ);
    return typename V::native(_mm512_maskz_scalef_ps(normal, y.v, n.v));
#else
    x = at_least(x, -127.0f);
    const V n = round_to_integer(x), f = x - n;
    const V y = fma(horner(f, fit), f, V(1.0f)) * power_of_two(n);
    return Flushed ? y : V::select(x <= V(-126.5f), V::zero(), y);
#endif
  }
}

// What dropout multiplies scores by, for `lanes` queries from at.i on and 4 keys from at.j on: factors[key][lanes].
// Lanes are a multiple of a register of either type.
template <class A>
void dropout_factors(const attention::dropout& stage, const attention::detail::score_shape& shape, const score_run& at,
                     index_t lanes, A* factors) noexcept {
  using U = typename vec<double>::native_uint;
  const auto threshold = static_cast<std::uint32_t>(stage.p * 0x1p32);
  const A kept = static_cast<A>(1 / (1 - stage.p));
  const auto step = static_cast<std::uint64_t>(attention::dropout::blocks_of_row(shape.keys));
  U row{};
  for (int i = 0; i < philox_lanes; ++i) row[i] = static_cast<std::uint64_t>(i) * step;
  for (index_t l = 0; l < lanes; l += philox_lanes) {
    const std::uint64_t block = attention::dropout::block(shape.heads, shape.keys, at.b, at.h, at.i + l, at.j);
    const philox_registers random = philox_blocks({stage.seed, stage.stream}, row + block);
    MLKIT_UNROLL
    for (int key = 0; key < 4; ++key) {
      A* to = factors + key * lanes + l;
      MLKIT_SIMD
      for (int i = 0; i < philox_lanes; ++i)
        to[i] = static_cast<std::uint32_t>(random.words[key][i]) < threshold ? A{} : kept;
    }
  }
}

// Lets scores of `lanes` queries against key at.j + j be dropped: fills factors [4][lanes] where a new four of keys
// begins, and points at those of this key.
template <class A, class... Stages>
MLKIT_ALWAYS_INLINE const A* next_factors(const attention::scores<Stages...>& pipeline,
                                          const attention::detail::score_shape& shape, const score_run& at,
                                          index_t lanes, A* factors) noexcept {
  attention::detail::each_stage(pipeline, [&](const auto& stage) {
    if constexpr (attention::detail::is_dropout<std::remove_cvref_t<decltype(stage)>>)
      if (at.j % 4 == 0) dropout_factors(stage, shape, at, lanes, factors);
  });
  return factors + at.j % 4 * lanes;
}

// Calls f with the pipeline's bias, if it has one whose rows differ.
template <class F, class... Stages>
MLKIT_ALWAYS_INLINE void with_bias_rows(const attention::scores<Stages...>& pipeline, F&& f) noexcept {
  attention::detail::each_stage(pipeline, [&](const auto& stage) {
    if constexpr (attention::detail::is_bias<std::remove_cvref_t<decltype(stage)>>)
      if (stage.values.strides[2] != 0) f(stage.values);
  });
}

// Probabilities times the factors of the pipeline's dropout, if it has one.
template <class V, class... Stages>
MLKIT_ALWAYS_INLINE V drop_any(const attention::scores<Stages...>&, V x,
                               const typename V::value_type* factors) noexcept {
  if constexpr (attention::detail::any_dropout<attention::scores<Stages...>>)
    return x * V::load(factors);
  else
    return x;
}
