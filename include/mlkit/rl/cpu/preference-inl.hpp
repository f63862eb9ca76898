// Losses of pairs, of labelled and of ranked completions, in lanes whose number no set decides.

template <class T>
bool finite_elements(const T* x, index_t step, index_t n) noexcept {
  using V = vec<T>;
  if (step != 1) {
    for (index_t i = 0; i < n; ++i)
      if (!std::isfinite(x[i * step])) return false;
    return true;
  }
  V sum = V::zero();  // 0 x is 0 or, of what is not finite, NaN
  for (index_t i = 0; i < n; i += V::width) {
    const V some = V::load(x + i, static_cast<int>(std::min<index_t>(V::width, n - i)));
    sum += some * T(0);
  }
  return sum.sum() == 0;
}

// n elements that stand `step` apart, as those of an array: where they are, or in `buffer`, with 0 behind them.
template <class T, int Lanes>
MLKIT_ALWAYS_INLINE const T* preference_from(const rl::detail::strided<const T>& v, index_t i, int n,
                                             T (&buffer)[Lanes]) noexcept {
  if (v.data && v.step == 1 && n == Lanes) return v.data + i;
  for (int l = 0; l < Lanes; ++l) buffer[l] = T{};
  if (v.data)
    for (int l = 0; l < n; ++l) buffer[l] = *v.at(i + l);
  return buffer;
}
template <class T, int Lanes>
MLKIT_ALWAYS_INLINE void preference_to(const T (&from)[Lanes], const rl::detail::strided<T>& v, index_t i,
                                       int n) noexcept {
  if (!v.data) return;
  if (v.step == 1 && n == Lanes)
    __builtin_memcpy(v.data + i, from, sizeof from);
  else
    for (int l = 0; l < n; ++l) *v.at(i + l) = from[l];
}

// In a fixed order: halves are added until one lane is left.
template <class T>
MLKIT_ALWAYS_INLINE double sum_of_lanes(const T (&lanes)[16]) noexcept {
  double some[8];
  MLKIT_SIMD
  for (int l = 0; l < 8; ++l) some[l] = static_cast<double>(lanes[l]) + static_cast<double>(lanes[l + 8]);
  return ((some[0] + some[4]) + (some[2] + some[6])) + ((some[1] + some[5]) + (some[3] + some[7]));
}

// Pairs [begin, end).
template <class T, class Loss>
rl::detail::pair_sums pair_losses(const rl::detail::pair_problem<T, Loss>& p, index_t begin, index_t end) noexcept {
  constexpr int lanes = rl::detail::preference_lanes;
  const Loss loss = *p.loss;
  const T factor = p.factor;
  T losses[lanes] = {}, right[lanes] = {}, chosen[lanes] = {}, rejected[lanes] = {};
  for (index_t i = begin; i < end; i += lanes) {
    const int n = static_cast<int>(std::min<index_t>(lanes, end - i));
    T buffers[5][lanes];
    const T* x[5];
    for (int k = 0; k < 5; ++k) x[k] = preference_from(p.operands[k], i, n, buffers[k]);
    const T *c = x[0], *r = x[1], *c_reference = x[2], *r_reference = x[3], *margin = x[4];
    T value[lanes], d_chosen[lanes], d_rejected[lanes], c_reward[lanes], r_reward[lanes];
    MLKIT_SIMD
    for (int l = 0; l < lanes; ++l) {
      const auto term = loss(rl::pair_point<T>{c[l], r[l], c_reference[l], r_reference[l], margin[l]});
      value[l] = term.loss;
      d_chosen[l] = term.d_chosen * factor;
      d_rejected[l] = term.d_rejected * factor;
      c_reward[l] = term.chosen_reward;
      r_reward[l] = term.rejected_reward;
    }
    preference_to(d_chosen, p.d_chosen, i, n);
    preference_to(d_rejected, p.d_rejected, i, n);
    preference_to(value, p.losses, i, n);
    if (n < lanes)
      for (int l = n; l < lanes; ++l) value[l] = c_reward[l] = r_reward[l] = T{};
    MLKIT_SIMD
    for (int l = 0; l < lanes; ++l) {
      losses[l] += value[l];
      right[l] += c_reward[l] > r_reward[l] ? T(1) : T(0);
      chosen[l] += c_reward[l];
      rejected[l] += r_reward[l];
    }
  }
  return {sum_of_lanes(losses), sum_of_lanes(right), sum_of_lanes(chosen), sum_of_lanes(rejected)};
}

// Completions [begin, end).
template <class T>
rl::detail::kto_sums kto_losses(const rl::detail::kto_problem<T>& p, index_t begin, index_t end) noexcept {
  constexpr int lanes = rl::detail::preference_lanes;
  const rl::kto loss = p.loss;
  const T factor = p.factor;
  T losses[lanes] = {}, good[lanes] = {}, bad[lanes] = {};
  index_t desirable = 0;
  for (index_t i = begin; i < end; i += lanes) {
    const int n = static_cast<int>(std::min<index_t>(lanes, end - i));
    T buffers[2][lanes], value[lanes], d[lanes], reward[lanes];
    std::uint8_t label_buffer[lanes];
    const T *x = preference_from(p.log_probs, i, n, buffers[0]),
            *reference = preference_from(p.reference, i, n, buffers[1]);
    const std::uint8_t* label = preference_from(p.desirable, i, n, label_buffer);
    MLKIT_SIMD
    for (int l = 0; l < lanes; ++l) {
      const auto term = loss(x[l], reference[l], label[l] != 0);
      value[l] = term.loss;
      d[l] = term.d_log_prob * factor;
      reward[l] = term.reward;
    }
    preference_to(d, p.d_log_probs, i, n);
    preference_to(value, p.losses, i, n);
    if (n < lanes)
      for (int l = n; l < lanes; ++l) value[l] = reward[l] = T{};
    for (int l = 0; l < n; ++l) desirable += label[l] != 0;
    MLKIT_SIMD
    for (int l = 0; l < lanes; ++l) {
      losses[l] += value[l];
      good[l] += rl::detail::choose(label[l] != 0, reward[l], T{});
      bad[l] += rl::detail::choose(label[l] != 0, T{}, reward[l]);
    }
  }
  return {sum_of_lanes(losses), sum_of_lanes(good), sum_of_lanes(bad), desirable};
}

// Prompts [begin, end), the pairs of each gathered into blocks. scratch holds two elements for each completion of a
// prompt: rewards and gradients.
template <class T>
rl::detail::k_wise_sums k_wise_losses(const rl::detail::k_wise_problem<T>& p, index_t begin, index_t end,
                                      T* scratch) noexcept {
  constexpr int lanes = rl::detail::preference_lanes, block = 16 * lanes;
  constexpr T certain = 1e4;                          // a difference that adds nothing
  T differences[block], slopes[block], signs[block];  // of pair (i, j): 1 where i is the better one, else -1
  index_t firsts[block], seconds[block];
  rl::detail::k_wise_sums all;
  for (index_t g = begin; g < end; ++g) {
    const index_t first = p.places.begin(g), k = p.places.end(g) - first;
    T *rewards = scratch, *gradient = scratch + k;
    for (index_t i = 0; i < k; ++i) {
      rewards[i] = *p.rewards.at(first + i);
      gradient[i] = T{};
    }
    T losses[lanes] = {};
    double right = 0, chosen = 0, rejected = 0;
    int gathered = 0;
    index_t pairs = 0;
    const auto finish = [&] {
      const int padded = static_cast<int>(round_up(gathered, lanes));
      for (int l = gathered; l < padded; ++l) differences[l] = certain;
      for (int at = 0; at < padded; at += lanes) {
        const T* difference = differences + at;
        T* slope = slopes + at;
        MLKIT_SIMD
        for (int l = 0; l < lanes; ++l) {
          const rl::detail::log_sigmoid<T> s(difference[l]);
          losses[l] -= s.value;
          slope[l] = s.derivative;
        }
      }
      T sum{};  // over the pairs of one i, which come in a row
      for (int l = 0; l < gathered; ++l) {
        const T slope = signs[l] * slopes[l];
        sum += slope;
        gradient[seconds[l]] += slope;
        if (l + 1 == gathered || firsts[l + 1] != firsts[l]) {
          gradient[firsts[l]] -= sum;
          sum = T{};
        }
      }
      pairs += gathered;
      gathered = 0;
    };
    for (index_t i = 0; i < k; ++i)
      for (index_t j = i + 1; j < k; ++j) {
        const std::int32_t rank = p.ranks.data ? *p.ranks.at(first + i) : 0,
                           other = p.ranks.data ? *p.ranks.at(first + j) : 1;
        if (rank == other) continue;
        const bool first_is_better = rank < other;
        const T difference = rewards[i] - rewards[j];
        firsts[gathered] = i;
        seconds[gathered] = j;
        signs[gathered] = first_is_better ? T(1) : T(-1);
        differences[gathered] = first_is_better ? difference : -difference;
        right += differences[gathered] > 0 ? 1 : 0;
        chosen += static_cast<double>(first_is_better ? rewards[i] : rewards[j]);
        rejected += static_cast<double>(first_is_better ? rewards[j] : rewards[i]);
        if (++gathered == block) finish();
      }
    finish();
    if (p.d_rewards.data) {
      const T factor = static_cast<T>(pairs > 0 ? p.factor / static_cast<double>(pairs) : 0);
      for (index_t i = 0; i < k; ++i) *p.d_rewards.at(first + i) = gradient[i] * factor;
    }
    if (pairs > 0) all.loss += sum_of_lanes(losses) / static_cast<double>(pairs);
    all.right += right, all.chosen += chosen, all.rejected += rejected, all.pairs += static_cast<double>(pairs);
  }
  return all;
}

// The sum or mean of sequence b.
template <class T>
T sequence_sum(const rl::detail::sequence_sum_problem<T>& p, index_t b) noexcept {
  constexpr int lanes = rl::detail::preference_lanes;
  const auto [row, first, count] = p.places(b);
  const bool whole = p.log_probs.time == 1, masked = p.mask.data != nullptr;
  T sums[lanes] = {};
  index_t kept = 0;
  for (index_t t = 0; t < count; t += lanes) {
    const int n = static_cast<int>(std::min<index_t>(lanes, count - t));
    const T* x = p.log_probs.at(row, first + t);
    std::uint8_t keep[lanes];
    T buffer[lanes];
    for (int l = 0; l < lanes; ++l) keep[l] = l < n;
    if (masked)
      for (int l = 0; l < n; ++l) keep[l] = *p.mask.at(row, first + t + l) != 0;
    for (int l = 0; l < n; ++l) kept += keep[l];
    if (!whole || n < lanes) {
      for (int l = 0; l < n; ++l) buffer[l] = x[l * p.log_probs.time];
      for (int l = n; l < lanes; ++l) buffer[l] = T{};
      x = buffer;
    }
    MLKIT_SIMD
    for (int l = 0; l < lanes; ++l) sums[l] += rl::detail::choose(keep[l] != 0, x[l], T{});
  }
  const T sum = static_cast<T>(sum_of_lanes(sums));
  return p.mean && kept > 0 ? sum / static_cast<T>(kept) : sum;
}
