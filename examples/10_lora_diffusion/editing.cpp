// Prompt-to-Prompt: a word of the prompt is changed, and the image stays what it was apart from that. Hertz et al.:
// "Prompt-to-Prompt image editing with cross attention control", 2022.
#include "subjects.hpp"

#include <mlkit/nn/edited_attention.hpp>

using namespace examples;
namespace attention = mlkit::attention;

namespace {

using token_ids = std::vector<std::int32_t>;

// What the denoiser attends to in one step: the edit's words and patches follow those of the source.
struct edited_attention {
  const attention::edit_plan& plan;
  index_t step;

  nn::var<float> cross(nn::var<float> q, nn::var<float> k, nn::var<float> v, index_t heads,
                       std::span<const std::int32_t> lengths) const {
    return nn::edited_cross_attention(q, k, v, heads, attention::scores{attention::key_lengths{lengths}}, plan, step);
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
  mutable index_t step = 0;

  index_t pixels() const { return model.pixels(); }
  token_ids hidden() const { return model.hidden(); }
  nn::var<float> operator()(nn::var<float> x, std::span<const std::int32_t> t,
                            std::span<const std::int32_t> ids) const {
    return model(x, t, ids, edited_attention{plan, step++});
  }
};

// Sources, what the edited prompts give by themselves from the same noise, and under Prompt-to-Prompt.
struct edits {
  image_set sources, alone, edited;
};

template <class Align>
edits edit_all(const mlkit::cpu& exec, const crowns& subject, const crowns::model& model,
               const std::vector<std::string>& source, const std::vector<std::string>& target, const Align& align,
               std::uint64_t seed) {
  const auto n = static_cast<index_t>(source.size()), d = model.pixels();
  const index_t length = model.options().length;
  const auto room = [&] { return image_set{mlkit::matrix<float>({n, d}), {}}; };
  edits all{room(), room(), room()};
  const sampling& o = subject.sampling;
  for (index_t i = 0; i < n; ++i) {
    const std::string &from = source[static_cast<std::size_t>(i)], &to = target[static_cast<std::size_t>(i)];
    const nn::word_tokenizer& words = subject.art.words;
    // Guidance puts two rows without a caption before the source and its edit.
    const attention::edit_plan plan(
        {.steps = o.steps, .self = {0, 0.8}, .unedited = 2},
        {{.words = align(words.encode(from), words.encode(to), length), .cross = {0, 0.8}}});
    const std::vector<std::int32_t> both = subject.art.ids(std::vector{from, to});
    const auto draw = [&](const auto& denoiser, image_set& second) {
      mlkit::matrix<float> x({2, d});  // from the same noise
      for (index_t c = 0; c < d; ++c)
        x(0, c) = x(1, c) = stream(seed, draw_of::start).normal(static_cast<std::uint64_t>(i * d + c));
      nn::sample<float>(exec, guided(exec, denoiser, both, o), crowns::sampler{}, subject.schedule(), x,
                        {.steps = o.steps, .predicts = edited_denoiser::predicts, .seed = seed});
      std::copy_n(&x(0, 0), d, &all.sources.pixels(i, 0));
      std::copy_n(&x(1, 0), d, &second.pixels(i, 0));
    };
    draw(model, all.alone);
    draw(edited_denoiser{model, plan}, all.edited);
  }
  return all;
}

}  // namespace

void crowns::edit_prompts(const mlkit::cpu& exec, const model& taught, std::uint64_t seed, int runs, report& report,
                          const std::filesystem::path& out) const {
  progress bar("Prompt-to-Prompt", 2 * runs);
  // Edits the prompts of `before` to those of `wanted`, which differ in one attribute.
  const auto edit = [&](const std::string& name, const std::string& file, const std::vector<sprite>& before,
                        const std::vector<sprite>& wanted, std::size_t attribute, const auto& align,
                        double most_change) {
    std::vector<double> followed, alone, changed;
    for (int run = 0; run < runs; ++run, bar.next()) {
      const edits all = edit_all(exec, *this, taught, rare_captions(before), rare_captions(wanted), align,
                                 seed + static_cast<std::uint64_t>(run));
      followed.push_back(recognised(exec, *probe_, all.edited, wanted)[attribute]);
      alone.push_back(recognised(exec, *probe_, all.alone, wanted)[attribute]);
      changed.push_back(distance(all.edited.pixels, all.sources.pixels) /
                        distance(all.alone.pixels, all.sources.pixels));
      if (run == 0)
        write_some(out / file, "Prompt-to-Prompt, " + name + ": from the same noise", rare_captions(wanted),
                   {{"source", all.sources.pixels}, {"alone", all.alone.pixels}, {"edited", all.edited.pixels}});
    }
    report.at_least("Prompt-to-Prompt, " + name + ": as asked", over(followed), 0.7);
    report.measured("    by the edited prompt alone", over(alone));
    report.at_most("    distance to the source, over that of the edited prompt alone", over(changed), most_change);
  };

  std::vector<sprite> others = fresh_, open = fresh_, patterned = fresh_;
  for (std::size_t i = 0; i < fresh_.size(); ++i) {
    others[i].colour = (fresh_[i].colour + 2) % values_of(1);
    open[i].pattern = -1;
    patterned[i].pattern = 1 + static_cast<int>(i) % 2;
  }
  const auto replaced = [](const token_ids& from, const token_ids& to, index_t length) {
    return attention::align_replaced({from}, {to}, length);
  };
  edit("another colour", "edited_colours.png", fresh_, others, 1, replaced, 1);  // most of it is the colour itself
  edit("a new word", "edited_patterns.png", open, patterned, 2, attention::align_refined, 0.95);
}
