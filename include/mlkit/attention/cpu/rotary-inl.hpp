// Rotary embedding, a row of one head at a time: registers of first and second elements of pairs.

// v's lanes, each twice: 0 0 1 1 ...
template <class V>
MLKIT_ALWAYS_INLINE V twice(V v) noexcept {
  V r;
  MLKIT_UNROLL
  for (int l = 0; l < V::width; ++l) r.v[l] = v.v[l / 2];
  return r;
}
// Neighbours exchanged: 1 0 3 2 ...
template <class V>
MLKIT_ALWAYS_INLINE V exchanged(V v) noexcept {
  V r;
  MLKIT_UNROLL
  for (int l = 0; l < V::width; ++l) r.v[l] = v.v[l ^ 1];
  return r;
}

// Calls f(at, n) for registers that cover [0, count): n is the width, but for the last.
template <class V, class F>
MLKIT_ALWAYS_INLINE void each_piece(index_t count, F&& f) noexcept {
  for (index_t c = 0; c < count; c += V::width) f(c, static_cast<int>(std::min<index_t>(V::width, count - c)));
}

template <class A, class T, class Out>
void rotate_halves(const T* x, const A* cosines, const A* sines, A sign, index_t half, Out* y) noexcept {
  using V = vec<A>;
  each_piece<V>(half, [&](index_t c, int n) {
    const V a = V::load(x + c, n), b = V::load(x + half + c, n);
    const V cosine = V::load(cosines + c, n), sine = V::load(sines + c, n) * sign;
    (a * cosine - b * sine).store(y + c, n);
    (b * cosine + a * sine).store(y + half + c, n);
  });
}

template <class A, class T, class Out>
void rotate_adjacent(const T* x, const A* cosines, const A* sines, A sign, index_t half, Out* y) noexcept {
  using V = vec<A>;
  V signs;
  MLKIT_UNROLL
  for (int l = 0; l < V::width; ++l) signs.v[l] = l % 2 == 0 ? -sign : sign;
  each_piece<V>(2 * half, [&](index_t c, int n) {
    const V a = V::load(x + c, n);
    const V cosine = twice(V::load(cosines + c / 2, n / 2)), sine = twice(V::load(sines + c / 2, n / 2));
    (a * cosine + exchanged(a) * (sine * signs)).store(y + c, n);
  });
}

// Rows [begin, end) of all batches, heads and positions.
template <class Problem>
void rotate_rows(const Problem& p, index_t begin, index_t end) noexcept {
  using A = typename std::remove_cvref_t<decltype(*p.table)>::value_type;
  const index_t heads = p.x.extents[1], n = p.x.extents[2], d = p.x.extents[3];
  const auto& at = p.how->positions;
  const index_t turned = p.table->d();
  const A sign = p.how->back ? A(-1) : A(1);
  for (index_t row = begin; row < end; ++row) {
    const index_t i = row % n, h = row / n % heads, b = row / n / heads;
    const auto* x = p.x.data + b * p.x.strides[0] + h * p.x.strides[1] + i * p.x.strides[2];
    auto* y = p.out.data + b * p.out.strides[0] + h * p.out.strides[1] + i * p.out.strides[2];
    const A* table = p.table->row(at.data ? at(at.extents[0] == 1 ? 0 : b, i) : p.how->first + i);
    if (p.how->pairs == attention::pairing::halves)
      rotate_halves(x, table, table + turned / 2, sign, turned / 2, y);
    else
      rotate_adjacent(x, table, table + turned / 2, sign, turned / 2, y);
    each_piece<vec<A>>(d - turned,
                       [&](index_t c, int count) { vec<A>::load(x + turned + c, count).store(y + turned + c, count); });
  }
}

template <class Problem>
auto rotary_entry() noexcept {
  return &rotate_rows<Problem>;
}
