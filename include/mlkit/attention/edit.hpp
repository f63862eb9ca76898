// Prompt-to-Prompt: attention of an edited prompt that follows a source prompt's. Hertz et al.: "Prompt-to-Prompt image
// editing with cross attention control", 2022.
#pragma once

#include <deque>

#include "alignment.hpp"
#include "forward.hpp"

namespace MLKIT_NAMESPACE::attention {

/// A part of a generation's steps, as fractions of them.
struct step_range {
  double begin = 0, end = 1;
};

/// Tokens of a target prompt that are edited in steps of their own.
struct token_steps {
  std::vector<std::int32_t> tokens;
  step_range steps;
};

/// How the attention of one target prompt is edited. Replacement, refinement and reweighting are one: in the steps of
/// `cross`, target token t is paid the attention
///     equaliser[t] (taken[t] sum over s of mapping[s, t] P_source[s] + (1 - taken[t]) P[t]),
/// and else its own P[t].
struct prompt_edit {
  alignment words;                       ///< align_replaced, align_refined, align_same, or one's own
  std::vector<float> equaliser{};        ///< [length]; none is 1 for all
  step_range cross{0, 0.8};              ///< of cross-attention
  std::vector<token_steps> of_tokens{};  ///< the same for single tokens, in order
};

/// What edits of a generation have in common.
struct edit_options {
  index_t steps = 50;           ///< of the generation
  step_range self{0, 0.4};      ///< of self-attention
  index_t self_queries = 1024;  ///< self-attention of more tokens is left alone: details are the edit's own
  index_t unedited = 0;         ///< sequences of a batch before the source, such as guidance's negative prompts
};

namespace detail {

// What edits do in one step: columns of v that probabilities of the source, and the edit's own, meet.
struct edit_recipe {
  struct entry {
    index_t source, target;
    double weight;
  };
  bool whole = false;            // v as it is, with the source's probabilities
  std::vector<entry> entries{};  // of v by the source's, in order of source
  std::vector<double> own{};     // factors of v with its own probabilities; none are zeros
  bool takes() const noexcept { return whole || !entries.empty() || own.empty(); }
};

inline void check_steps(std::string_view function, std::string_view name, const step_range& s) {
  if (!(s.begin >= 0 && s.begin <= s.end && s.end <= 1))
    fail_value(function, ": ", name, " = [", s.begin, ", ", s.end, ") is no part of [0, 1]");
}
inline bool contains(const step_range& s, index_t steps, index_t step) noexcept {
  const auto n = static_cast<double>(steps);
  return step >= static_cast<index_t>(s.begin * n) && step < static_cast<index_t>(s.end * n);
}

}  // namespace detail

/// The edits of a batch [unedited..., source, edit, edit, ...] over the steps of a generation. Throws shape_error where
/// an edit's parts are not of one length, and value_error for ranges, tokens and weights that are none.
class edit_plan {
 public:
  edit_plan(const edit_options& o, std::vector<prompt_edit> edits) : options_(o), edits_(std::move(edits)) {
    constexpr std::string_view function = "attention::edit_plan";
    constexpr index_t most = std::numeric_limits<std::int32_t>::max();
    if (o.steps < 1 || o.steps > most)
      detail::fail_value(function, ": steps = ", o.steps, " is outside [1, ", most, "]");
    if (o.unedited < 0 || o.unedited > most)
      detail::fail_value(function, ": unedited = ", o.unedited, " is outside [0, ", most, "]");
    if (o.self_queries < 0) detail::fail_value(function, ": self_queries = ", o.self_queries, " is negative");
    detail::check_steps(function, "self", o.self);
    if (edits_.empty()) detail::fail_value(function, ": there is no edit");
    for (const prompt_edit& e : edits_) {
      const auto n = static_cast<std::size_t>(length());
      if (e.words.length != length())
        detail::fail_shape(function, ": an alignment has ", e.words.length, " tokens, but the first has ", length());
      const auto check = [&](std::string_view name, const std::vector<float>& values, std::size_t count) {
        if (values.size() != count)
          detail::fail_shape(function, ": ", name, " has ", values.size(), " elements, but must have ", count);
        for (const float x : values)
          if (!std::isfinite(x)) detail::fail_value(function, ": ", name, " has an element ", x);
      };
      check("mapping", e.words.mapping, n * n);
      check("taken", e.words.taken, n);
      for (const float x : e.words.taken)
        if (!(x >= 0 && x <= 1)) detail::fail_value(function, ": taken = ", x, " is outside [0, 1]");
      if (!e.equaliser.empty()) check("equaliser", e.equaliser, n);
      detail::check_steps(function, "cross", e.cross);
      for (const token_steps& t : e.of_tokens) {
        detail::check_steps(function, "of_tokens", t.steps);
        for (const std::int32_t token : t.tokens)
          if (token < 0 || token >= length())
            detail::fail_value(function, ": of_tokens has token ", token, ", which is outside [0, ", length(), ")");
      }
    }
  }

  /// The source and its edits.
  index_t prompts() const noexcept { return 1 + static_cast<index_t>(edits_.size()); }
  index_t batch() const noexcept { return options_.unedited + prompts(); }
  index_t length() const noexcept { return edits_.front().words.length; }  ///< tokens of a prompt
  const edit_options& options() const noexcept { return options_; }
  const std::vector<prompt_edit>& edits() const noexcept { return edits_; }

  /// Whether self-attention of so many queries is the source's in this step.
  bool replaces_self(index_t step, index_t queries) const noexcept {
    return queries <= options_.self_queries && detail::contains(options_.self, options_.steps, step);
  }
  /// Whether an edit changes the attention paid to a token in this step. As in the paper's code, fractions are of one
  /// step more than there are.
  bool edits_token(std::size_t edit, index_t token, index_t step) const noexcept {
    const prompt_edit& e = edits_[edit];
    const step_range* range = &e.cross;
    for (const token_steps& t : e.of_tokens)
      if (std::find(t.tokens.begin(), t.tokens.end(), token) != t.tokens.end()) range = &t.steps;
    return detail::contains(*range, options_.steps + 1, step);
  }

  /// Throws value_error unless 0 <= step < steps.
  void check_step(std::string_view function, index_t step) const {
    if (step < 0 || step >= options_.steps)
      detail::fail_value(function, ": step = ", step, " is outside [0, ", options_.steps, ")");
  }

  // What each edit does in a step.
  std::vector<detail::edit_recipe> cross_recipes(index_t step) const {
    std::vector<detail::edit_recipe> recipes(edits_.size());
    for (std::size_t i = 0; i < edits_.size(); ++i) {
      const prompt_edit& e = edits_[i];
      std::vector<double> taken(static_cast<std::size_t>(length())), own(taken.size());
      for (std::size_t t = 0; t < taken.size(); ++t) {
        const double factor = e.equaliser.empty() ? 1.0 : static_cast<double>(e.equaliser[t]);
        const double part = static_cast<double>(e.words.taken[t]);
        const bool edited = edits_token(i, static_cast<index_t>(t), step);
        taken[t] = edited ? factor * part : 0;
        own[t] = edited ? factor * (1 - part) : 1;
      }
      for (index_t s = 0; s < length(); ++s)
        for (index_t t = 0; t < length(); ++t)
          if (const double weight = static_cast<double>(e.words.weight(s, t)) * taken[static_cast<std::size_t>(t)];
              weight != 0)
            recipes[i].entries.push_back({s, t, weight});
      if (std::any_of(own.begin(), own.end(), [](double x) { return x != 0; })) recipes[i].own = std::move(own);
    }
    return recipes;
  }

 private:
  edit_options options_;
  std::vector<prompt_edit> edits_;
};

/// Where and when a local blend keeps what is not edited.
struct blend_options {
  index_t height = 16, width = 16;  ///< of the maps: cross-attention of height * width queries counts
  double threshold = 0.3;           ///< of the largest attention
  index_t pool = 1;                 ///< a pixel has the largest attention among its neighbours so many pixels away
  index_t start = 0;                ///< the first step in which latents are blended
};

/// Keeps an edit local: where neither the source nor the edit pays attention to the chosen words, latents are the
/// source's. The attention paid to the words of each prompt is summed over the edited_cross calls of one resolution,
/// over layers and steps, as it is after editing; it is the mean over heads. Hertz et al., section 3.2 and their code.
/// Throws value_error for options and tokens that are none.
class local_blend {
 public:
  /// The tokens of each prompt, the source's first, out of prompts of `length` tokens.
  local_blend(const blend_options& o, index_t length, const std::vector<std::vector<std::int32_t>>& tokens)
      : options_(o), length_(length), prompts_(static_cast<index_t>(tokens.size())) {
    constexpr std::string_view function = "attention::local_blend";
    if (o.height < 1) detail::fail_value(function, ": height = ", o.height, " is not positive");
    if (o.width < 1) detail::fail_value(function, ": width = ", o.width, " is not positive");
    if (!(o.threshold >= 0 && o.threshold <= 1))
      detail::fail_value(function, ": threshold = ", o.threshold, " is outside [0, 1]");
    if (o.pool < 0) detail::fail_value(function, ": pool = ", o.pool, " is negative");
    if (length < 0) detail::fail_value(function, ": length = ", length, " is negative");
    if (tokens.empty()) detail::fail_value(function, ": there is no prompt");
    constexpr index_t most = index_t{1} << 40;  // elements, far beyond any memory
    if (o.height > most / o.width || o.height * o.width > most / prompts_)
      detail::fail_value(function, ": ", prompts_, " maps of ", o.height, " x ", o.width, " are too large");
    if (length > most / prompts_)
      detail::fail_value(function, ": ", prompts_, " prompts of ", length, " tokens are too large");
    weights_.resize(static_cast<std::size_t>(prompts_ * length));
    for (std::size_t b = 0; b < tokens.size(); ++b)
      for (const std::int32_t t : tokens[b]) {
        if (t < 0 || t >= length)
          detail::fail_value(function, ": tokens[", b, "] has ", t, ", which is outside [0, ", length, ")");
        weights_[b * static_cast<std::size_t>(length) + static_cast<std::size_t>(t)] = 1;
      }
    clear();
  }

  const blend_options& options() const noexcept { return options_; }
  index_t prompts() const noexcept { return prompts_; }
  index_t length() const noexcept { return length_; }
  /// 1 for each chosen token, [prompts, length].
  matrix_view<const double> weights() const noexcept { return {weights_.data(), {prompts_, length_}}; }
  /// The attention so far, [prompts, height, width].
  tensor_view<const double, 3> sums() const noexcept {
    return {sums_.data(), {prompts_, options_.height, options_.width}};
  }
  /// Adds attention of a layer, [prompts, height * width]. Throws shape_error for another shape.
  template <class A>
  void add(const matrix_view<const A>& attention) {
    constexpr std::string_view function = "attention::local_blend::add";
    detail::check_view(function, "attention", attention);
    detail::check_extent(function, "attention", "rows", attention.extent(0), "local_blend's prompts", prompts_);
    detail::check_extent(function, "attention", "columns", attention.extent(1), "local_blend's pixels",
                         options_.height * options_.width);
    for (index_t b = 0; b < attention.extent(0); ++b)
      for (index_t i = 0; i < attention.extent(1); ++i)
        sums_[static_cast<std::size_t>(b * attention.extent(1) + i)] += static_cast<double>(attention(b, i));
  }
  /// Forgets the attention, for another generation.
  void clear() { sums_.assign(static_cast<std::size_t>(prompts_ * options_.height * options_.width), 0.0); }

  /// Where prompt b pays attention to its words: 1, else 0; [height, width]. Throws value_error for a prompt that there
  /// is not.
  std::vector<std::uint8_t> region(index_t b) const {
    if (b < 0 || b >= prompts_)
      detail::fail_value("attention::local_blend::region: prompt ", b, " is outside [0, ", prompts_, ")");
    const index_t h = options_.height, w = options_.width, pool = std::min(options_.pool, std::max(h, w));
    const double* sums = sums_.data() + b * h * w;
    const double top = *std::max_element(sums, sums + h * w);
    std::vector<std::uint8_t> inside(static_cast<std::size_t>(h * w));
    for (index_t y = 0; y < h; ++y)
      for (index_t x = 0; x < w; ++x) {
        double most = 0;
        for (index_t r = std::max<index_t>(0, y - pool); r < std::min(h, y + pool + 1); ++r)
          for (index_t c = std::max<index_t>(0, x - pool); c < std::min(w, x + pool + 1); ++c)
            most = std::max(most, sums[r * w + c]);
        inside[static_cast<std::size_t>(y * w + x)] = top > 0 && most / top > options_.threshold;
      }
    return inside;
  }

  /// latents [prompts, channels, rows, columns]: those of each edit become the source's outside both regions, which are
  /// stretched to their size by the nearest pixel. Nothing happens before options().start, and where no attention was
  /// seen the source's stay.
  template <executor Executor, viewable<4> X>
  void apply(const Executor& exec, index_t step, X&& latents) const {
    constexpr std::string_view function = "attention::local_blend::apply";
    const auto x = as_view(latents);
    detail::check_view(function, "latents", x);
    detail::check_extent(function, "latents", "batches", x.extent(0), "local_blend's prompts", prompts_);
    detail::arguments call(function, exec);
    call.writes("latents", x);
    if (step < options_.start) return;
    const std::vector<std::uint8_t> source = region(0);
    const index_t height = x.extent(2), width = x.extent(3);
    for (index_t b = 1; b < prompts_; ++b) {
      const std::vector<std::uint8_t> edit = region(b);
      parallel_for(exec, x.extent(1) * height, [&](index_t row) {
        const index_t c = row / height, y = row % height;
        for (index_t column = 0; column < width; ++column) {
          const auto at =
              static_cast<std::size_t>(y * options_.height / height * options_.width + column * options_.width / width);
          if (!source[at] && !edit[at]) x(b, c, y, column) = x(0, c, y, column);
        }
      });
    }
  }

 private:
  blend_options options_;
  index_t length_, prompts_;
  std::vector<double> weights_, sums_;
};

namespace detail {

// Attention whose values' columns are those of several results: of items of a batch, and their attention to words.
template <class Problem>
struct edit_problem : Problem {
  using sum = accumulator_t<typename Problem::value_type>;
  // Of what edits have of their own, and what is the source's besides: the first column, if there is such.
  static constexpr index_t none = -1;
  struct target {
    index_t item;  // 0 is the source, 1 its first edit
    bool of_words;
    index_t part = none;
    bool keep = false;  // it is for the part that this is computed
  };
  index_t source = 0;  // where in the batch it is
  std::vector<target> targets{};
  tensor_view<sum, 3> attention{};  // [items, heads, queries]
  // The parts of a task's queries, transposed, [columns][part_rows]: each thread has its own.
  sum* parts = nullptr;
  index_t part_rows = 0;
  // Keys [begin, end) whose values are not all zeros, in order, if not all are such; between multiples of
  // `values_step`.
  struct key_span {
    index_t begin, end;
  };
  std::vector<key_span> valued{};
  bool all_valued = true;
  static constexpr index_t values_step = 8;

  // Calls f(begin, end) for those among the keys [from, to).
  template <class F>
  void each_valued(index_t from, index_t to, F&& f) const noexcept {
    if (all_valued) return f(from, to);
    for (const key_span& s : valued)
      if (std::max(from, s.begin) < std::min(to, s.end)) f(std::max(from, s.begin), std::min(to, s.end));
  }

  template <class F>
  void each_out(index_t, index_t h, index_t i, index_t at, F&& f) const noexcept {
    for (const target& t : targets) {
      sum* const part = t.part == none ? nullptr : parts + t.part * part_rows;
      const sum* const more = part && !t.keep ? part + at : nullptr;
      if (t.keep)
        f(head_rows<sum>{part, part_rows, t.of_words ? 1 : this->out.extents[3], 1, part_rows}, at, more, part_rows);
      else if (t.of_words)
        f(head_rows<sum>{&attention(t.item, h, 0), attention.extent(2), 1, 1, 1}, i, more, part_rows);
      else
        f(head(this->out, source + t.item, h), i, more, part_rows);
    }
  }
};

template <class Problem>
class edited_attention {
  using T = typename Problem::value_type;
  using sum = accumulator_t<T>;
  using edited = edit_problem<Problem>;

 public:
  // The source is sequence `first` of the batch, and its edits follow.
  edited_attention(const cpu& exec, const Problem& p, index_t first, const std::vector<edit_recipe>& recipes,
                   local_blend* blend)
      : p_(p),
        source_(first),
        recipes_(recipes),
        blend_(blend),
        exec_(limit_threads(exec, static_cast<double>(p.q.extents[0] * p.q.extents[1]) *
                                      static_cast<double>(queries() * (keys() + 1)) *
                                      static_cast<double>(p.d + 2 * p.d_v + 16))) {}

  void run() {
    if (p_.q.extents[0] == 0 || p_.q.extents[1] == 0 || queries() == 0) return;
    const index_t heads = p_.q.extents[1];
    const workspace<sum> attention(blend_ ? items() * heads * queries() : 0);
    if (blend_) attention_ = {attention.data(), {items(), heads, queries()}};

    // What edits have of their own comes first: where they take something of the source's, that is added to it, as the
    // source's probabilities meet the values of all that they are taken for.
    std::vector<edited> runs;
    std::vector<index_t> of;
    std::deque<workspace<T>> values;
    const auto values_of = [&](const edited& r) { return values.emplace_back(kv_heads() * keys() * r.d_v).data(); };
    for (std::size_t e = 0; e < recipes_.size(); ++e) {
      if (recipes_[e].own.empty()) continue;
      const auto item = static_cast<index_t>(e) + 1;
      runs.push_back(of_its_own(item));
      of.push_back(source_ + item);
      const bool as_it_is =
          !blend_ && std::all_of(recipes_[e].own.begin(), recipes_[e].own.end(), [](double x) { return x == 1; });
      if (!as_it_is) fill_own(runs.back(), item, values_of(runs.back()));
    }
    runs.push_back(source());
    of.push_back(source_);
    fill_source(runs.back(), values_of(runs.back()));
    for (index_t b = 0; b < source_; ++b) {
      runs.push_back(over({{b - source_, false}}));
      runs.back().v = p_.v;
      of.push_back(b);
    }

    const auto kernels = select_forward<T, edited>();
    const index_t rows = rows_of_task<typename Problem::scores_type>(queries(), shape_of_tasks(p_).most_queries, heads,
                                                                     kernels.sliver, concurrency(exec_));
    const index_t task_parts = ceil_div(queries(), rows), part_columns = first_part(items());
    index_t bytes = 0;
    for (const edited& r : runs) bytes = std::max(bytes, kernels.scratch_bytes(r, rows));
    parallel_ranges(exec_, task_parts * heads, [&](index_t begin, index_t end) {
      const subnormals_flushed flushed;
      const workspace<std::byte> scratch(bytes);
      const workspace<sum> parts(part_columns * rows);
      std::vector<edited> own = runs;
      for (edited& r : own) r.parts = parts.data(), r.part_rows = rows;
      for (index_t task = begin; task < end; ++task) {
        const index_t first = task % task_parts * rows, count = std::min(rows, queries() - first);
        for (std::size_t r = 0; r < own.size() && count > 0; ++r)
          kernels.run(own[r], of[r], task / task_parts, first, count, scratch.data());
      }
    });
    if (blend_) add_to_blend();
  }

 private:
  index_t queries() const noexcept { return p_.q.extents[2]; }
  index_t keys() const noexcept { return p_.k.extents[2]; }
  index_t kv_heads() const noexcept { return p_.k.extents[1]; }
  index_t items() const noexcept { return static_cast<index_t>(recipes_.size()) + 1; }
  index_t limit(index_t item) const noexcept { return key_limit(*p_.scores, source_ + item, keys()); }

  // The problem over values of its own, which all items share.
  edited over(const std::vector<typename edited::target>& targets) const {
    edited r{p_, source_, targets, attention_};
    r.d_v = 0;
    for (const auto& t : targets) r.d_v += t.of_words ? 1 : p_.d_v;
    return r;
  }
  // Whether an edit has something of its own besides what is the source's, and the first of such columns.
  bool has_part(index_t item) const noexcept {
    if (item == 0) return false;
    const edit_recipe& recipe = recipes_[static_cast<std::size_t>(item - 1)];
    return recipe.takes() && !recipe.own.empty();
  }
  index_t first_part(index_t item) const noexcept {
    index_t columns = 0;
    for (index_t before = 0; before < item; ++before)
      if (has_part(before)) columns += p_.d_v + (blend_ ? 1 : 0);
    return columns;
  }
  typename edited::target target_of(index_t item, bool of_words, bool keep) const noexcept {
    if (!has_part(item)) return {item, of_words};
    return {item, of_words, first_part(item) + (of_words ? p_.d_v : 0), keep};
  }
  void use(edited& r, const T* values) const noexcept {
    r.v = {values, {p_.v.extents[0], kv_heads(), keys(), r.d_v}, {0, keys() * r.d_v, r.d_v, 1}};
  }
  edited source() const {
    std::vector<typename edited::target> targets;
    for (const bool of_words : {false, true})
      for (index_t item = 0; item < items() && (blend_ || !of_words); ++item)
        if (item == 0 || recipes_[static_cast<std::size_t>(item - 1)].takes())
          targets.push_back(target_of(item, of_words, false));
    return over(targets);
  }
  edited of_its_own(index_t item) const {
    std::vector<typename edited::target> targets{target_of(item, false, true)};
    if (blend_) targets.push_back(target_of(item, true, true));
    edited r = over(targets);
    if (!blend_) r.v = p_.v;
    return r;
  }

  // Row s: v of the source, then for each edit the values that it meets the source's attention to s with.
  void fill_source(edited& r, T* values) const {
    use(r, values);
    const index_t there = limit(0), d_v = p_.d_v;
    std::vector<std::vector<std::size_t>> first(recipes_.size());
    for (std::size_t e = 0; e < recipes_.size(); ++e) {
      first[e].resize(static_cast<std::size_t>(keys()) + 1);
      for (const auto& x : recipes_[e].entries) ++first[e][static_cast<std::size_t>(x.source) + 1];
      for (std::size_t s = 1; s < first[e].size(); ++s) first[e][s] += first[e][s - 1];
    }
    parallel_ranges(for_values(r), kv_heads() * keys(), [&](index_t begin, index_t end) {
      const workspace<sum> row(r.d_v);
      for (index_t at = begin; at < end; ++at) {
        const index_t kv = at / keys(), s = at % keys();
        std::fill_n(row.data(), r.d_v, sum{});
        sum* to = row.data();
        for (const auto& target : r.targets) {
          const index_t item = target.item, width = target.of_words ? 1 : d_v;
          const auto add = [&](index_t t, double weight) {
            if (t >= limit(item)) return;
            if (target.of_words)
              to[0] += static_cast<sum>(weight * blend_->weights()(item, t));
            else
              scale_value(item, kv, t, weight, [to](index_t c, sum x) { to[c] += x; });
          };
          if (s < there) {
            if (item == 0 || recipes_[static_cast<std::size_t>(item - 1)].whole) {
              add(s, 1);
            } else {
              const auto& e = recipes_[static_cast<std::size_t>(item - 1)];
              const auto& f = first[static_cast<std::size_t>(item - 1)];
              for (std::size_t x = f[static_cast<std::size_t>(s)]; x < f[static_cast<std::size_t>(s) + 1]; ++x)
                add(e.entries[x].target, e.entries[x].weight);
            }
          }
          to += width;
        }
        std::transform(row.data(), to, values + at * r.d_v, [](sum x) { return static_cast<T>(x); });
      }
    });
  }
  void fill_own(edited& r, index_t item, T* values) const {
    use(r, values);
    const index_t there = limit(item);
    const std::vector<double>& factors = recipes_[static_cast<std::size_t>(item - 1)].own;
    r.all_valued = false;
    for (index_t t = 0; t < keys(); ++t) {
      if (factors[static_cast<std::size_t>(t)] == 0 || (!r.valued.empty() && t < r.valued.back().end)) continue;
      const index_t begin = t / r.values_step * r.values_step, end = std::min(keys(), begin + r.values_step);
      if (!r.valued.empty() && r.valued.back().end == begin)
        r.valued.back().end = end;
      else
        r.valued.push_back({begin, end});
    }
    parallel_for(for_values(r), kv_heads() * keys(), [&](index_t at) {
      const index_t kv = at / keys(), t = at % keys();
      T* to = values + at * r.d_v;
      const double factor = factors[static_cast<std::size_t>(t)];
      if (t < there && factor != 0)
        scale_value(item, kv, t, factor, [to](index_t c, sum x) { to[c] = static_cast<T>(x); });
      else
        std::fill_n(to, p_.d_v, T{});
      if (blend_) to[p_.d_v] = static_cast<T>(static_cast<sum>(factor * blend_->weights()(item, t)));
    });
  }
  // Calls f(c, x) with the elements of a value, times a weight.
  template <class F>
  void scale_value(index_t item, index_t kv, index_t t, double weight, F&& f) const noexcept {
    const T* from = &p_.v(source_ + item, kv, t, 0);
    const index_t step = p_.v.strides[3], d_v = p_.d_v;
    const sum factor = static_cast<sum>(weight);
    if (step == 1) {
      MLKIT_SIMD
      for (index_t c = 0; c < d_v; ++c) f(c, factor * static_cast<sum>(from[c]));
    } else {
      for (index_t c = 0; c < d_v; ++c) f(c, factor * static_cast<sum>(from[c * step]));
    }
  }
  cpu for_values(const edited& r) const noexcept {
    return limit_threads(exec_, 2 * static_cast<double>(kv_heads() * keys() * r.d_v));
  }

  void add_to_blend() const {
    const index_t heads = p_.q.extents[1];
    const workspace<sum> mean(items() * queries());
    parallel_for(exec_, items() * queries(), [&](index_t at) {
      sum total = 0;
      for (index_t h = 0; h < heads; ++h) total += attention_(at / queries(), h, at % queries());
      mean.data()[at] = total / static_cast<sum>(heads);
    });
    blend_->add(matrix_view<const sum>(mean.data(), {items(), queries()}));
  }

  const Problem& p_;
  index_t source_;
  const std::vector<edit_recipe>& recipes_;
  local_blend* blend_;
  cpu exec_;
  tensor_view<sum, 3> attention_{};
};

struct run_edited_cross {
  std::string_view function;
  const edit_plan& plan;
  index_t step;
  local_blend* blend;
  template <class Problem>
  void operator()(arguments&, const cpu& exec, const Problem& p) const {
    check_extent(function, "q", "batches", p.q.extent(0), "plan", plan.batch());
    check_extent(function, "k", "keys", p.k.extent(2), "plan", plan.length());
    plan.check_step(function, step);
    if (blend) {
      check_extent(function, "blend", "prompts", blend->prompts(), "plan", plan.prompts());
      check_extent(function, "blend", "tokens", blend->length(), "plan", plan.length());
    }
    const bool counts = blend && p.q.extent(2) == blend->options().height * blend->options().width;
    edited_attention<Problem>(exec, p, plan.options().unedited, plan.cross_recipes(step), counts ? blend : nullptr)
        .run();
  }
};

struct run_edited_self {
  std::string_view function;
  const edit_plan& plan;
  index_t step;
  template <class Problem>
  void operator()(arguments&, const cpu& exec, const Problem& p) const {
    check_extent(function, "q", "batches", p.q.extent(0), "plan", plan.batch());
    plan.check_step(function, step);
    if (!plan.replaces_self(step, p.q.extent(2))) return run_forward(exec, p);
    edit_recipe whole;
    whole.whole = true;
    const std::vector<edit_recipe> recipes(plan.edits().size(), whole);
    edited_attention<Problem>(exec, p, plan.options().unedited, recipes, nullptr).run();
  }
};

template <class Q, class K, class V, class Scores, class Out, class Run>
void forward_edited(const cpu& exec, const Q& q, const K& k, const V& v, const Scores& s, Out&& out, const Run& run) {
  using T = element_t<const Q>;
  check_one_type<T, K, V>();
  forward(run.function, exec, tensor_view<const T, 4>(as_view(q)), tensor_view<const T, 4>(as_view(k)),
          tensor_view<const T, 4>(as_view(v)), s, as_view(out), tensor_view<accumulator_t<T>, 3>{}, nullptr, run);
}

}  // namespace detail

/// forward for a batch [unedited..., source, edit, edit, ...] of one generation, in which the attention that each edit
/// pays to the words of its prompt is what `plan` makes of the source's and its own in this step (see prompt_edit). k
/// and v are of prompts of plan.length() tokens. Tokens beyond key_lengths get nothing; masks are those of whose
/// attention it is.
///
/// An edit is linear in P: out = P_source (M diag(a) v) + P (diag(b) v). No map is stored, the source's scores are
/// computed once for all edits, and what has no weight in this step is not computed at all. The same dtypes as forward;
/// the same bits for any number of threads. Throws as forward does, shape_error where the plan is of another number of
/// prompts or tokens, and value_error for a step that is none.
template <executor Executor, viewable<4> Q, viewable<4> K, viewable<4> V, class... Stages, viewable<4> Out>
void edited_cross(const Executor& exec, const Q& q, const K& k, const V& v, const scores<Stages...>& s,
                  const edit_plan& plan, index_t step, Out&& out) {
  detail::forward_edited(exec, q, k, v, s, out,
                         detail::run_edited_cross{"attention::edited_cross", plan, step, nullptr});
}

/// The same, and what each prompt pays to the words of `blend` is added to it, if the layer is of its resolution.
template <executor Executor, viewable<4> Q, viewable<4> K, viewable<4> V, class... Stages, viewable<4> Out>
void edited_cross(const Executor& exec, const Q& q, const K& k, const V& v, const scores<Stages...>& s,
                  const edit_plan& plan, index_t step, Out&& out, local_blend& blend) {
  detail::forward_edited(exec, q, k, v, s, out,
                         detail::run_edited_cross{"attention::edited_cross", plan, step, &blend});
}

/// forward for the same batch, in which each edit pays the source's attention to its own values while the plan says so:
/// what keeps the layout of an image. Else forward.
template <executor Executor, viewable<4> Q, viewable<4> K, viewable<4> V, class... Stages, viewable<4> Out>
void edited_self(const Executor& exec, const Q& q, const K& k, const V& v, const scores<Stages...>& s,
                 const edit_plan& plan, index_t step, Out&& out) {
  detail::forward_edited(exec, q, k, v, s, out, detail::run_edited_self{"attention::edited_self", plan, step});
}

}  // namespace MLKIT_NAMESPACE::attention
