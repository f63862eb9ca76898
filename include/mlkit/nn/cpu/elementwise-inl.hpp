// f(i) for every i of a range, at this set's full width where f can be vectorised.

template <class F>
void for_range(index_t begin, index_t end, const F& f) noexcept {
  MLKIT_SIMD
  for (index_t i = begin; i < end; ++i) f(i);
}

// y = f(x)
template <class F, class T>
void activate_range(index_t begin, index_t end, const F& f, const T* x, T* y) noexcept {
  using V = vec<T>;
  index_t i = begin;
  for (; i + V::width <= end; i += V::width) evaluate(f, V::load(x + i)).store(y + i);
  if (const int rest = static_cast<int>(end - i)) evaluate(f, V::load(x + i, rest)).store(y + i, rest);
}

// dx += dy f'(x)
template <class F, class T>
void activate_gradient_range(index_t begin, index_t end, const F& f, const T* x, const T* dy, T* dx) noexcept {
  using V = vec<T>;
  index_t i = begin;
  for (; i + V::width <= end; i += V::width)
    fma(V::load(dy + i), evaluate_derivative(f, V::load(x + i)), V::load(dx + i)).store(dx + i);
  if (const int rest = static_cast<int>(end - i))
    fma(V::load(dy + i, rest), evaluate_derivative(f, V::load(x + i, rest)), V::load(dx + i, rest)).store(dx + i, rest);
}

// One row of a normalisation: y = (x - mean) r [* gain] [+ bias], r = 1 / sqrt(mean((x - mean)^2) + epsilon); without
// Centred, mean is 0. kept holds mean and r.
template <bool Centred, class T>
void normalise_row(index_t n, const T* x, const T* gain, const T* bias, T epsilon, T* y, T* kept) noexcept {
  T sum = 0, square = 0;
  if constexpr (Centred) {
    MLKIT_SIMD_SUM(sum)
    for (index_t c = 0; c < n; ++c) sum += x[c];
  }
  const T mean = sum / static_cast<T>(n);
  MLKIT_SIMD_SUM(square)
  for (index_t c = 0; c < n; ++c) square += (x[c] - mean) * (x[c] - mean);
  const T r = T(1) / std::sqrt(square / static_cast<T>(n) + epsilon);
  kept[0] = mean;
  kept[1] = r;
  MLKIT_SIMD
  for (index_t c = 0; c < n; ++c) y[c] = (x[c] - mean) * r * (gain ? gain[c] : T(1)) + (bias ? bias[c] : T(0));
}

// dx += r (g - mean(g) - h mean(g h)) with h = (x - mean) r and g = dy * gain; the middle term only if Centred.
template <bool Centred, class T>
void normalise_row_gradient(index_t n, const T* x, const T* gain, const T* kept, const T* dy, T* dx) noexcept {
  const T mean = kept[0], r = kept[1];
  T sum = 0, product = 0;
  MLKIT_SIMD_SUM(sum, product)
  for (index_t c = 0; c < n; ++c) {
    const T g = dy[c] * (gain ? gain[c] : T(1));
    sum += g;
    product += g * ((x[c] - mean) * r);
  }
  const T first = Centred ? sum / static_cast<T>(n) : T(0), second = product / static_cast<T>(n);
  MLKIT_SIMD
  for (index_t c = 0; c < n; ++c) dx[c] += r * (dy[c] * (gain ? gain[c] : T(1)) - first - (x[c] - mean) * r * second);
}
