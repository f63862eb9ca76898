// Prompt-to-Prompt: a word of the prompt is changed, and the image stays what it was apart from that. Hertz et al.:
// "Prompt-to-Prompt image editing with cross attention control", 2022.
#include "subjects.hpp"

#include <mlkit/nn/edited_attention.hpp>

using namespace examples;
namespace attention = mlkit::attention;

namespace {

using words = std::vector<std::int32_t>;

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
  words hidden() const { return model.hidden(); }
  nn::var<float> operator()(nn::var<float> x, std::span<const std::int32_t> t,
                            std::span<const std::int32_t> ids) const {
    return model(x, t, ids, edited_attention{plan, step++});
  }
};

words without_padding(words ids) {
  std::erase(ids, nn::word_tokenizer::padding);
  return ids;
}

// Sources, what the edited prompts give by themselves from the same noise, and under Prompt-to-Prompt.
struct edits {
  image_set sources, alone, edited;
};

template <class Align>
edits edit_all(const mlkit::cpu& exec, const crowns& subject, const crowns::model& model,
               const std::vector<words>& source, const std::vector<words>& target, const Align& align,
               std::uint64_t seed) {
  const auto n = static_cast<index_t>(source.size()), d = model.pixels();
  const index_t length = model.options().length;
  const auto room = [&] { return image_set{mlkit::matrix<float>({n, d}), {}}; };
  edits all{room(), room(), room()};
  const sampling& o = subject.sampling;
  for (index_t i = 0; i < n; ++i) {
    const words &from = source[static_cast<std::size_t>(i)], &to = target[static_cast<std::size_t>(i)];
    // Guidance puts two rows without a caption before the source and its edit.
    const attention::edit_plan plan(
        {.steps = o.steps, .self = {0, 0.5}, .unedited = 2},
        {{.words = align(without_padding(from), without_padding(to), length), .cross = {0, 0.8}}});
    words both = from;
    both.insert(both.end(), to.begin(), to.end());
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

void crowns::edit_prompts(const mlkit::cpu& exec, const model& taught, std::uint64_t seed, report& report,
                          const std::filesystem::path& out) const {
  const auto one = [&](const std::string& name, const std::string& file, auto change, auto open, int attribute,
                       const auto& align, double most_distance) {
    std::vector<sprite> wanted = fresh_, before = fresh_;
    for (std::size_t i = 0; i < wanted.size(); ++i) change(wanted[i], static_cast<int>(i)), open(before[i]);
    const auto ids = [&](const std::vector<sprite>& sprites) {
      std::vector<words> each;
      for (const std::string& text : rare_captions(sprites)) each.push_back(art.words.encode(text));
      return each;
    };
    const edits all = edit_all(exec, *this, taught, ids(before), ids(wanted), align, seed);
    const auto follows = [&](const image_set& images) {
      return recognised(exec, *probe_, images, wanted)[static_cast<std::size_t>(attribute)];
    };
    const double apart = distance(all.edited.pixels, all.sources.pixels),
                 alone = distance(all.alone.pixels, all.sources.pixels);
    report.at_least("Prompt-to-Prompt, " + name + ": as asked", follows(all.edited), 0.7);
    report.measured("    by the edited prompt alone", follows(all.alone));
    report.at_most("    distance to the source, over that of the edited prompt alone", apart / alone, most_distance);
    write_some(out / file, "Prompt-to-Prompt, " + name + ": from the same noise", rare_captions(wanted),
               {{"source", all.sources.pixels}, {"alone", all.alone.pixels}, {"edited", all.edited.pixels}});
  };
  one(
      "another colour", "edited_colours.png", [](sprite& s, int) { s.colour = (s.colour + 2) % values_of(1); },
      [](sprite&) {}, 1,
      [](const words& from, const words& to, index_t length) {
        return attention::align_replaced({from}, {to}, length);
      },
      0.95);
  one(
      "a new word", "edited_patterns.png", [](sprite& s, int i) { s.pattern = 1 + i % 2; },
      [](sprite& s) { s.pattern = -1; }, 2,
      [](const words& from, const words& to, index_t length) { return attention::align_refined(from, to, length); },
      0.95);
}
