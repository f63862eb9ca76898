// Labels of a cross-entropy: which rows have one, and which it is after a shift.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include "steps.hpp"
#include "token_ids.hpp"

namespace MLKIT_NAMESPACE::rl {

/// How a cross-entropy reads its labels.
struct cross_entropy_options {
  std::int64_t ignore = -100;  ///< the label of rows that do not count: prompts and padding
  bool shift = false;          ///< row t predicts label t + 1 of its sequence, and the last row predicts none
  /// Starts of packed sequences, [sequences + 1], for logits [tokens, vocabulary]; where labels are shifted, none
  /// crosses into another sequence. Without it [tokens, vocabulary] is one sequence.
  sequence_starts cu_seqlens = {};
  double normaliser = 0;       ///< what the sum is divided by; 0 means the number of rows that count
  double label_smoothing = 0;  ///< the part of the target that is spread over the vocabulary, in [0, 1)
  double temperature = 1;      ///< logits are divided by it; > 0
};

/// What cross_entropy returns.
struct cross_entropy_result {
  double loss = 0;
  index_t count = 0;  ///< rows that count
};

namespace detail {

/// Checks labels [batch, time] of rows of the same shape, and what is said of them; where their sequences are.
template <int Rank>
sequence_places check_labels(arguments& call, std::string_view function, const token_ids<Rank>& labels,
                             std::string_view rows_of, const std::type_identity_t<extents_t<Rank>>& shape,
                             const cross_entropy_options& o, bool on_host = true) {
  check_same_shape<Rank>(function, "labels", labels.extents(), rows_of, shape);
  labels.visit([&](const auto& v) {
    check_view(function, "labels", v);
    call.reads("labels", v);
  });
  check_temperature(function, o.temperature);
  if (!(o.label_smoothing >= 0 && o.label_smoothing < 1))
    fail_value(function, ": label_smoothing = ", o.label_smoothing, " is outside [0, 1)");
  check_non_negative(function, "normaliser", o.normaliser);
  return check_sequences<Rank>(call, function, "labels", shape, o.cu_seqlens, on_host);
}

/// The label of each row, and whether it has one.
struct row_labels {
  std::vector<std::int64_t> of;
  std::vector<std::uint8_t> counts;
  index_t count = 0;
  double divisor = 1;

  template <int Rank>
  row_labels(arguments& call, std::string_view function, const token_ids<Rank>& labels, std::string_view rows_of,
             const std::type_identity_t<extents_t<Rank>>& shape, index_t vocabulary, const cross_entropy_options& o) {
    const sequence_places places = check_labels<Rank>(call, function, labels, rows_of, shape, o);
    const index_t batch = Rank == 2 ? shape[0] : 1, time = shape[Rank - 1];
    of.assign(static_cast<std::size_t>(batch * time), 0);
    counts.assign(of.size(), 0);
    const auto label = [&](index_t b, index_t t) {
      if constexpr (Rank == 1)
        return labels(t);
      else
        return labels(b, t);
    };
    for (index_t b = 0; b < batch; ++b) {
      index_t sequence = 0;
      for (index_t t = 0; t < time; ++t) {
        const std::int64_t y = label(b, t);
        if (y == o.ignore) continue;
        if (y < 0 || y >= vocabulary)
          fail_value(function, ": ", index_text<Rank>("labels", b * time + t, shape), " = ", y, " is outside [0, ",
                     vocabulary, ") and not ", o.ignore, ", which is ignored");
        if (places.starts)
          while (places.starts[sequence + 1] <= t) ++sequence;
        const index_t start = places.starts ? places.starts[sequence] : 0;
        if (o.shift && t == start) continue;  // nothing predicts the first of a sequence
        const auto row = static_cast<std::size_t>(b * time + t - (o.shift ? 1 : 0));
        of[row] = y;
        counts[row] = 1;
        ++count;
      }
    }
    divisor = o.normaliser > 0 ? o.normaliser : static_cast<double>(std::max<index_t>(1, count));
  }
};

}  // namespace detail
}  // namespace MLKIT_NAMESPACE::rl
