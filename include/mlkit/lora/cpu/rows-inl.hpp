// Passes over rows: sums of squares of a weight's rows, and products summed over tokens.

inline constexpr index_t row_run = 512;

// The sum of the squares of `count` elements, at the precision of A within a run, in f64 over runs.
template <class A>
double square_sum(const A* x, index_t count) noexcept {
  using V = vec<A>;
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  index_t i = 0;
  for (; i + 4 * V::width <= count; i += 4 * V::width) {
    MLKIT_UNROLL
    for (int j = 0; j < 4; ++j) {
      const V v = V::load(x + i + j * V::width);
      sums[j] = fma(v, v, sums[j]);
    }
  }
  for (; i < count; i += V::width) {
    const V v = V::load(x + i, static_cast<int>(std::min<index_t>(V::width, count - i)));
    sums[0] = fma(v, v, sums[0]);
  }
  return static_cast<double>(((sums[0] + sums[1]) + (sums[2] + sums[3])).sum());
}

// squares[line] = the sum of the squares of line `line` of the operand, for lines [first, last).
template <class Source, class A>
void square_lines(const operand<Source>& op, index_t first, index_t last, A* squares) noexcept {
  if (op.depth_first) {
    A run[row_run];
    for (index_t l = first; l < last; ++l) {
      double sum = 0;
      for (index_t k = 0; k < op.depth(); k += row_run) {
        const index_t n = std::min(row_run, op.depth() - k);
        if constexpr (std::is_same_v<Source, dense_source<A>>) {
          if (op.source.col_stride == 1) {
            sum += square_sum(op.source.data + l * op.source.row_stride + k, n);
            continue;
          }
        }
        decode_run(set_tag{}, op.source, l, k, n, run);
        sum += square_sum(static_cast<const A*>(run), n);
      }
      squares[l] = static_cast<A>(sum);
    }
    return;
  }
  A run[row_run];
  double sums[row_run];
  for (index_t l = first; l < last; l += row_run) {  // a run goes along lines
    const index_t n = std::min(row_run, last - l);
    for (index_t i = 0; i < n; ++i) sums[i] = 0;
    for (index_t k = 0; k < op.depth(); ++k) {
      decode_run(set_tag{}, op.source, k, l, n, run);
      for (index_t i = 0; i < n; ++i) sums[i] += static_cast<double>(run[i]) * static_cast<double>(run[i]);
    }
    for (index_t i = 0; i < n; ++i) squares[l + i] = static_cast<A>(sums[i]);
  }
}

// One line of the operand.
template <class Source, class A>
void decode_line(const operand<Source>& op, index_t line, A* out) noexcept {
  if (op.depth_first)
    for (index_t k = 0; k < op.depth(); k += row_run)
      decode_run(set_tag{}, op.source, line, k, std::min(row_run, op.depth() - k), out + k);
  else
    for (index_t k = 0; k < op.depth(); ++k) decode_run(set_tag{}, op.source, k, line, 1, out + k);
}

// sums[j] += sum over rows i of a[i, j] b[i, j], for columns [first, last), in the order of rows.
template <class S, class A>
void add_column_products(const dense_source<S>& a, const dense_source<A>& b, index_t first, index_t last,
                         A* sums) noexcept {
  using V = vec<A>;
  A run[row_run];
  for (index_t j = first; j < last; j += row_run) {
    const index_t n = std::min(row_run, last - j);
    for (index_t i = 0; i < a.rows(); ++i) {
      decode_run(set_tag{}, a, i, j, n, run);
      const A* other = b.data + i * b.row_stride + j;
      for (index_t l = 0; l < n; l += V::width) {
        const int m = static_cast<int>(std::min<index_t>(V::width, n - l));
        fma(V::load(run + l, m), V::load(other + l, m), V::load(sums + j + l, m)).store(sums + j + l, m);
      }
    }
  }
}

// Elements of a dense matrix, each column times its factor.
template <class T, class A, class Out>
void decode_run(set_tag, const scaled_source<T, A>& s, index_t row, index_t col, index_t count,
                Out* MLKIT_RESTRICT out) noexcept {
  A run[row_run];
  for (index_t i = 0; i < count; i += row_run) {
    const index_t n = std::min(row_run, count - i);
    decode_run(set_tag{}, s.source, row, col + i, n, run);
    if (s.along_rows)
      for (index_t j = 0; j < n; ++j) run[j] *= s.factors[row];
    else
      for (index_t j = 0; j < n; ++j) run[j] *= s.factors[col + i + j];
    const dense_source<A> scaled{run, 1, n, n, 1};
    decode_run(set_tag{}, scaled, 0, 0, n, out + i);
  }
}

// largest[line] = the largest magnitude in line `line` of the operand, or NaN if an element is not finite.
template <class Source>
void largest_lines(const operand<Source>& op, index_t first, index_t last, double* largest) noexcept {
  using A = accumulator_t<typename Source::value_type>;
  using V = vec<A>;
  A run[row_run];
  for (index_t l = first; l < last; l += op.depth_first ? 1 : row_run) {
    const index_t lines = op.depth_first ? 1 : std::min(row_run, last - l);
    if (op.depth_first) {
      V high = V::zero(), tracer = V::zero();  // tracer becomes NaN where an element is not finite
      for (index_t k = 0; k < op.depth(); k += row_run) {
        const index_t n = std::min(row_run, op.depth() - k);
        decode_run(set_tag{}, op.source, l, k, n, run);
        for (index_t i = 0; i < n; i += V::width) {
          const V x = V::load(run + i, static_cast<int>(std::min<index_t>(V::width, n - i)));
          high = max(high, abs(x));
          tracer = fma(x, V::zero(), tracer);
        }
      }
      A lanes[V::width], most = 0;
      high.store(lanes);
      for (int i = 0; i < V::width; ++i) most = std::max(most, lanes[i]);
      largest[l] = static_cast<double>(most) + static_cast<double>(tracer.sum());
      continue;
    }
    for (index_t i = 0; i < lines; ++i) largest[l + i] = 0;
    for (index_t k = 0; k < op.depth(); ++k) {
      decode_run(set_tag{}, op.source, k, l, lines, run);
      for (index_t i = 0; i < lines; ++i) {
        const double x = static_cast<double>(run[i] < 0 ? -run[i] : run[i]) + 0 * static_cast<double>(run[i]);
        if (!(x <= largest[l + i])) largest[l + i] = x + 0 * largest[l + i];
      }
    }
  }
}
