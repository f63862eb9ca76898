// Prompt-to-Prompt: a word of the prompt is changed, and the image stays what it was apart from that. Hertz et al.:
// "Prompt-to-Prompt image editing with cross attention control", 2022.
#include "common/curves.hpp"
#include "subjects.hpp"

#include <mlkit/nn/edited_attention.hpp>

#include <functional>

using namespace examples;
namespace attention = mlkit::attention;

namespace {

using token_ids = std::vector<std::int32_t>;
using words_of_edit = std::function<attention::prompt_edit(const token_ids& source, const token_ids& target)>;

// A word's place in a caption: "begin", size, colour, pattern, shape.
constexpr std::int32_t colour_word = 2, pattern_word = 3;

// What the denoiser attends to in one step: the edit's words and patches follow those of the source.
struct edited_attention {
  const attention::edit_plan& plan;
  attention::local_blend* blend;
  index_t step;

  nn::var<float> cross(nn::var<float> q, nn::var<float> k, nn::var<float> v, index_t heads,
                       std::span<const std::int32_t> lengths) const {
    return nn::edited_cross_attention(q, k, v, heads, attention::scores{attention::key_lengths{lengths}}, plan, step,
                                      blend);
  }
  nn::var<float> self(nn::var<float> q, nn::var<float> k, nn::var<float> v, index_t heads) const {
    return nn::edited_self_attention(q, k, v, heads, attention::scores<>{}, plan, step);
  }
};

// The denoiser under a plan. It is asked once in each step of a generation.
struct edited_denoiser {
  using value_type = float;
  static constexpr nn::prediction predicts = crowns::model::predicts;
  const crowns::model& model;
  const attention::edit_plan& plan;
  attention::local_blend* blend;
  mutable index_t step = 0;

  index_t pixels() const { return model.pixels(); }
  token_ids hidden() const { return model.hidden(); }
  nn::var<float> operator()(nn::var<float> x, std::span<const std::int32_t> t,
                            std::span<const std::int32_t> ids) const {
    return model(x, t, ids, edited_attention{plan, blend, step++});
  }
};

// Images of `target` that follow those of `source` from the same noise. With `local` words, pixels stay the source's
// where neither prompt pays attention to them.
image_set edited(const mlkit::cpu& exec, const crowns& subject, const crowns::model& model,
                 const std::vector<std::string>& source, const std::vector<std::string>& target,
                 const words_of_edit& words, const token_ids& local, std::uint64_t seed) {
  const text_denoiser_options& shape = model.options();
  const index_t n = static_cast<index_t>(source.size()), d = model.pixels(), grid = shape.side / shape.patch;
  const sampling& o = subject.sampling;
  image_set images{mlkit::matrix<float>({n, d}), {}};
  for (index_t i = 0; i < n; ++i) {
    const std::string &from = source[static_cast<std::size_t>(i)], &to = target[static_cast<std::size_t>(i)];
    // Guidance puts two rows without a caption before the source and its edit.
    const attention::edit_plan plan({.steps = o.steps, .self = {0, 0.8}, .unedited = 2},
                                    {words(subject.art.words.encode(from), subject.art.words.encode(to))});
    attention::local_blend blend({.height = grid, .width = grid, .threshold = 0.5, .pool = 0}, shape.length,
                                 {local, local});
    const edited_denoiser denoiser{model, plan, local.empty() ? nullptr : &blend};
    const auto keep = [&](index_t step, mlkit::matrix_view<float> x) {  // rows of an image: pixels, then colours
      const mlkit::tensor_view<float, 4> latents(x.data, {2, shape.channels, shape.side, shape.side},
                                                 {d, 1, shape.side * shape.channels, shape.channels});
      if (denoiser.blend) blend.apply(exec, step, latents);
    };
    mlkit::matrix<float> x({2, d});
    for (index_t c = 0; c < d; ++c)
      x(0, c) = x(1, c) = stream(seed, draw_of::start).normal(static_cast<std::uint64_t>(i * d + c));
    nn::sample<float>(exec, guided(exec, denoiser, subject.art.ids(std::vector{from, to}), o), crowns::sampler{},
                      subject.schedule(), x, {.steps = o.steps, .predicts = edited_denoiser::predicts, .seed = seed},
                      keep);
    std::transform(&x(1, 0), &x(1, 0) + d, &images.pixels(i, 0), [](float v) { return std::clamp(v, -1.0f, 1.0f); });
  }
  return images;
}

// The root mean square difference where the first shows the ground.
double change_of_ground(const image_set& a, const image_set& b) {
  double sum = 0, pixels = 0;
  for (const float *p = a.pixels.begin(), *q = b.pixels.begin(); p < a.pixels.end(); p += 3, q += 3)
    if (is_ground(p)) {
      ++pixels;
      for (int c = 0; c < 3; ++c) sum += static_cast<double>((p[c] - q[c]) * (p[c] - q[c]));
    }
  return std::sqrt(sum / (3 * pixels));
}

}  // namespace

void crowns::edit_prompts(const mlkit::cpu& exec, const model& taught, std::uint64_t seed, int runs, report& report,
                          const std::filesystem::path& out) const {
  constexpr double factors[] = {-2, 0, 0.5, 1, 2, 4};
  progress bar("Prompt-to-Prompt", runs * static_cast<index_t>(3 + std::size(factors)));
  const index_t length = taught.options().length;
  const auto noise = [&](int run) { return seed + static_cast<std::uint64_t>(run); };
  const auto of_prompts = [&](const std::vector<std::string>& prompts, int run) {
    auto o = sampling;
    o.seed = noise(run);
    return sample(exec, taught, schedule(), art.ids(prompts), o, sampler{});
  };

  // Edits the prompts of `before` to those of `wanted`, which differ in one attribute. Returns how much the ground
  // changed.
  const auto edit = [&](const std::string& name, const std::string& file, const std::vector<sprite>& before,
                        const std::vector<sprite>& wanted, std::size_t attribute, const words_of_edit& words,
                        const token_ids& local, double most_change) {
    std::vector<double> followed, by_itself, changed, ground;
    const std::vector<std::string> from = rare_captions(before), to = rare_captions(wanted);
    for (int run = 0; run < runs; ++run, bar.next()) {
      const image_set sources = of_prompts(from, run), alone = of_prompts(to, run),
                      images = edited(exec, *this, taught, from, to, words, local, noise(run));
      followed.push_back(recognised(exec, *probe_, images, wanted)[attribute]);
      by_itself.push_back(recognised(exec, *probe_, alone, wanted)[attribute]);
      changed.push_back(distance(images.pixels, sources.pixels) / distance(alone.pixels, sources.pixels));
      ground.push_back(change_of_ground(sources, images));
      if (run == 0)
        write_some(out / file, "Prompt-to-Prompt, " + name + ": from the same noise", to,
                   {{"source", sources.pixels}, {"alone", alone.pixels}, {"edited", images.pixels}});
    }
    report.at_least("Prompt-to-Prompt, " + name + ": as asked", over(followed), 0.7);
    report.measured("    by the edited prompt alone", over(by_itself));
    report.at_most("    distance to the source, over that of the edited prompt alone", over(changed), most_change);
    return ground;
  };

  std::vector<sprite> others = fresh_, open = fresh_, patterned = fresh_;
  for (std::size_t i = 0; i < fresh_.size(); ++i) {
    others[i].colour = (fresh_[i].colour + 2) % values_of(1);
    open[i].pattern = -1;
    patterned[i].pattern = 1 + static_cast<int>(i) % 2;
  }
  const auto replaced = [&](const token_ids& from, const token_ids& to) {
    return attention::prompt_edit{.words = attention::align_replaced({from}, {to}, length)};
  };
  const auto refined = [&](const token_ids& from, const token_ids& to) {
    return attention::prompt_edit{.words = attention::align_refined(from, to, length)};
  };
  // Most of the distance is the colour itself.
  const auto ground = edit("another colour", "edited_colours.png", fresh_, others, 1, replaced, {}, 1);
  const auto kept =
      edit("another colour, blended", "edited_locally.png", fresh_, others, 1, replaced, {colour_word}, 1);
  report.at_most("    change of the ground, over that without a local blend", over(ratios(kept, ground)), 0.95);
  edit("a new word", "edited_patterns.png", open, patterned, 2, refined, {}, 0.95);

  // More and less of a word: the same prompt, in which attention to its pattern is multiplied.
  const std::vector<std::string> captions = rare_captions(patterned);
  std::map<double, std::vector<double>> seen;
  std::deque<image_set> first;
  std::vector<sheet_row> rows;
  for (int run = 0; run < runs; ++run)
    for (const double factor : factors) {
      const auto reweighted = [&](const token_ids&, const token_ids&) {
        attention::prompt_edit e{.words = attention::align_same(length), .cross = {0, 1}};
        e.equaliser.assign(static_cast<std::size_t>(length), 1);
        e.equaliser[pattern_word] = static_cast<float>(factor);
        return e;
      };
      image_set images = edited(exec, *this, taught, captions, captions, reweighted, {}, noise(run));
      seen[factor].push_back(recognised(exec, *probe_, images, patterned)[2]);
      bar.next();
      if (run == 0) rows.push_back({"weight " + number(factor, 2), first.emplace_back(std::move(images)).pixels});
    }
  write_some(out / "reweighted.png", "Prompt-to-Prompt, attention to the word of the pattern", captions, rows);
  write_curves(out / "reweighted", {"Patterns recognised by the weight of their word", "weight", "share recognised"},
               {means("pattern", seen)});
  report.at_least("Prompt-to-Prompt, weight 0 for a word: its pattern is seen less often, by",
                  over(differences(seen[1], seen[0])), 0.4);
  report.at_least("    weight 2: as asked", over(seen[2]), 0.8);
}
