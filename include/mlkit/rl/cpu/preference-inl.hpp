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

// Pairs of ranked completions, gathered from as many prompts as fill a block.
template <class T>
struct k_wise_block {
  static constexpr int lanes = rl::detail::preference_lanes, size = 16 * lanes;
  T values[size], slopes[size];  // of the difference of a pair, which `values` holds at first
  T signs[size];                 // of pair (i, j): 1 where i is the better one, else -1
  index_t firsts[size], seconds[size];
  struct prompt {
    index_t index, pairs;
    int end;  // of its pairs in the block
  } prompts[size];
  int gathered = 0, ended = 0;

  // log(sigmoid(x)) of all differences, and its derivatives.
  void evaluate() noexcept {
    const int padded = static_cast<int>(round_up(gathered, lanes));
    for (int l = gathered; l < padded; ++l) values[l] = T{};
    for (int at = 0; at < padded; at += lanes) {
      T *value = values + at, *slope = slopes + at;
      MLKIT_SIMD
      for (int l = 0; l < lanes; ++l) {
        const rl::detail::log_sigmoid<T> s(value[l]);
        value[l] = s.value;
        slope[l] = s.derivative;
      }
    }
  }
};

// Prompts [begin, end). scratch holds two elements for each of their completions: rewards and gradients.
template <class T>
rl::detail::k_wise_sums k_wise_losses(const rl::detail::k_wise_problem<T>& p, index_t begin, index_t end,
                                      T* scratch) noexcept {
  const index_t origin = p.places.begin(begin), completions = p.places.end(end - 1) - origin;
  const bool ranked = p.ranks.data != nullptr;
  T *rewards = scratch, *gradient = scratch + completions;
  for (index_t i = 0; i < completions; ++i) {
    rewards[i] = *p.rewards.at(origin + i);
    gradient[i] = T{};
  }
  rl::detail::k_wise_sums all;
  k_wise_block<T> block;
  double loss = 0;  // of the prompt whose pairs have not all been seen
  const auto take = [&](int l, int last) {
    T sum{};  // over the pairs of one i, which come in a row
    for (; l < last; ++l) {
      const T slope = block.signs[l] * block.slopes[l];
      loss -= static_cast<double>(block.values[l]);
      sum += slope;
      gradient[block.seconds[l]] += slope;
      if (l + 1 == last || block.firsts[l + 1] != block.firsts[l]) {
        gradient[block.firsts[l]] -= sum;
        sum = T{};
      }
    }
  };
  const auto finish = [&] {
    block.evaluate();
    int from = 0;
    for (int at = 0; at < block.ended; ++at) {
      const auto& prompt = block.prompts[at];
      take(from, prompt.end);
      from = prompt.end;
      const auto pairs = static_cast<double>(prompt.pairs);
      if (prompt.pairs > 0) all.loss += loss / pairs;
      all.pairs += pairs;
      loss = 0;
      if (!p.d_rewards.data) continue;
      const T factor = static_cast<T>(prompt.pairs > 0 ? p.factor / pairs : 0);
      for (index_t i = p.places.begin(prompt.index); i < p.places.end(prompt.index); ++i)
        *p.d_rewards.at(i) = gradient[i - origin] * factor;
    }
    take(from, block.gathered);
    block.gathered = block.ended = 0;
  };
  for (index_t g = begin; g < end; ++g) {
    const index_t first = p.places.begin(g) - origin, last = p.places.end(g) - origin;
    index_t pairs = 0;
    for (index_t i = first; i < last; ++i)
      for (index_t j = i + 1; j < last; ++j) {
        const std::int32_t rank = ranked ? *p.ranks.at(origin + i) : 0, other = ranked ? *p.ranks.at(origin + j) : 1;
        if (rank == other) continue;
        const T better = rank < other ? rewards[i] : rewards[j], worse = rank < other ? rewards[j] : rewards[i];
        const int l = block.gathered++;
        block.firsts[l] = i;
        block.seconds[l] = j;
        block.signs[l] = rank < other ? T(1) : T(-1);
        block.values[l] = better - worse;
        all.right += better > worse ? 1 : 0;
        all.chosen += static_cast<double>(better);
        all.rejected += static_cast<double>(worse);
        ++pairs;
        if (block.gathered == block.size) finish();
      }
    block.prompts[block.ended++] = {g, pairs, block.gathered};
    if (block.ended == block.size) finish();
  }
  finish();
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
