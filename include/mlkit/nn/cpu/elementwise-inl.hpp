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

// y = Op::value(a, b) over a run of n elements; b follows (step 1) or stays (step 0).
template <class Op, class T>
void combine_run(index_t n, const T* a, const T* b, index_t step, T* y) noexcept {
  if (step) {
    MLKIT_SIMD
    for (index_t i = 0; i < n; ++i) y[i] = Op::value(a[i], b[i]);
  } else {
    const T same = *b;
    MLKIT_SIMD
    for (index_t i = 0; i < n; ++i) y[i] = Op::value(a[i], same);
  }
}

// da += Op::first(dy, a, b)
template <class Op, class T>
void combine_first_gradient(index_t n, const T* dy, const T* a, const T* b, index_t step, T* da) noexcept {
  if (step) {
    MLKIT_SIMD
    for (index_t i = 0; i < n; ++i) da[i] += Op::first(dy[i], a[i], b[i]);
  } else {
    const T same = *b;
    MLKIT_SIMD
    for (index_t i = 0; i < n; ++i) da[i] += Op::first(dy[i], a[i], same);
  }
}

// db += Op::second(dy, a, b)
template <class Op, class T>
void combine_second_gradient(index_t n, const T* dy, const T* a, const T* b, T* db) noexcept {
  MLKIT_SIMD
  for (index_t i = 0; i < n; ++i) db[i] += Op::second(dy[i], a[i], b[i]);
}

// The sum of Op::second(dy, a, b) over a run of n elements beside one b.
template <class Op, class T>
T combined_run_sum(index_t n, const T* dy, const T* a, T b) noexcept {
  T sum = 0;
  MLKIT_SIMD_SUM(sum)
  for (index_t i = 0; i < n; ++i) sum += Op::second(dy[i], a[i], b);
  return sum;
}

// db[c] += the sum of Op::second(dy, a, b[c]) over `outer` matrices, `stride` apart, of `rows` rows, `columns` apart.
// `count` columns, at most 64. Rows are added in blocks of 64, which keeps the rounding error of long sums small.
template <class Op, class T>
void combined_rows_gradient(index_t outer, index_t stride, index_t rows, index_t columns, index_t count, const T* dy,
                            const T* a, const T* b, T* db) noexcept {
  T total[64] = {};
  for (index_t o = 0; o < outer; ++o)
    for (index_t first = 0; first < rows; first += 64) {
      T block[64] = {};
      for (index_t r = first, end = std::min(rows, first + 64); r < end; ++r) {
        const index_t from = o * stride + r * columns;
        MLKIT_SIMD
        for (index_t c = 0; c < count; ++c) block[c] += Op::second(dy[from + c], a[from + c], b[c]);
      }
      for (index_t c = 0; c < count; ++c) total[c] += block[c];
    }
  for (index_t c = 0; c < count; ++c) db[c] += total[c];
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

// One group of a group normalisation: y = (x - mean) r [* gain] [+ bias] for `channels` runs of n elements, a gain and
// a bias each; mean and r over all of them. kept holds mean and r. Sums of the channels are added one by one, which
// keeps their rounding error small.
template <class T>
void normalise_group(index_t channels, index_t n, const T* x, const T* gain, const T* bias, T epsilon, T* y,
                     T* kept) noexcept {
  const T count = static_cast<T>(channels * n);
  T mean = 0, square = 0;
  for (index_t c = 0; c < channels; ++c) {
    T sum = 0;
    MLKIT_SIMD_SUM(sum)
    for (index_t i = 0; i < n; ++i) sum += x[c * n + i];
    mean += sum;
  }
  mean /= count;
  for (index_t c = 0; c < channels; ++c) {
    T sum = 0;
    MLKIT_SIMD_SUM(sum)
    for (index_t i = 0; i < n; ++i) sum += (x[c * n + i] - mean) * (x[c * n + i] - mean);
    square += sum;
  }
  const T r = T(1) / std::sqrt(square / count + epsilon);
  kept[0] = mean;
  kept[1] = r;
  for (index_t c = 0; c < channels; ++c) {
    const T scale = gain ? r * gain[c] : r, shift = bias ? bias[c] : T(0);
    MLKIT_SIMD
    for (index_t i = 0; i < n; ++i) y[c * n + i] = (x[c * n + i] - mean) * scale + shift;
  }
}

// sums[c] = sum(dy), products[c] = sum(dy h) with h = (x - mean) r; dx, unless it is null,
// += r (g - mean(g) - h mean(g h)) with g = dy gain[c], the means over the whole group.
template <class T>
void normalise_group_gradient(index_t channels, index_t n, const T* x, const T* gain, const T* kept, const T* dy,
                              T* sums, T* products, T* dx) noexcept {
  const T mean = kept[0], r = kept[1];
  T first = 0, second = 0;
  for (index_t c = 0; c < channels; ++c) {
    T sum = 0, product = 0;
    MLKIT_SIMD_SUM(sum, product)
    for (index_t i = 0; i < n; ++i) {
      sum += dy[c * n + i];
      product += dy[c * n + i] * (x[c * n + i] - mean);
    }
    sums[c] = sum;
    products[c] = product * r;
    first += gain ? sum * gain[c] : sum;
    second += gain ? products[c] * gain[c] : products[c];
  }
  if (!dx) return;
  const T count = static_cast<T>(channels * n), a = r * (first / count), b = r * r * (second / count);
  for (index_t c = 0; c < channels; ++c) {
    const T scale = gain ? r * gain[c] : r;
    MLKIT_SIMD
    for (index_t i = 0; i < n; ++i) dx[c * n + i] += dy[c * n + i] * scale - a - (x[c * n + i] - mean) * b;
  }
}
