// Images for a game from captions: a diffusion model learns to draw items in words; then each knob of sampling is
// turned: guidance, negative prompts, the sampler, and the image to start from.
#include "common/app.hpp"
#include "common/curves.hpp"
#include "common/game_art.hpp"
#include "common/sprite_sheet.hpp"

#include <mlkit/nn/files.hpp>

#include <algorithm>
#include <map>

using namespace examples;

struct settings {
  index_t training = 900, steps = 12;
  int runs = 3;
  double guidance = 2.5;
  std::vector<std::string> prompts;
  std::string negative;
};

// What all parts share: the model, the judge, and combinations that training did not have.
struct studio {
  mlkit::cpu exec;
  settings chosen;
  std::uint64_t seed;
  std::filesystem::path out;
  game_art art{seed};
  classifier probe = train_probe(exec, seed + 1);
  std::vector<sprite> unseen = combinations(true);

  sampling options(int run, double guidance) const {
    return {.steps = chosen.steps, .guidance = guidance, .seed = seed + 10 + static_cast<std::uint64_t>(run)};
  }
  template <class Sampler = nn::dpm_solver>
  image_set paint(const std::vector<sprite>& wanted, const sampling& o, const Sampler& sampler = {}) const {
    return sample(exec, art.model, art.schedule, art.ids(wanted), o, sampler);
  }
  // Shares of shape, colour, pattern, size and all four that are as wanted.
  std::vector<double> judge(const image_set& images, const std::vector<sprite>& wanted) const {
    return recognised(exec, probe, images, wanted);
  }
};

// Every seventh of 36, around and around: some of each kind, for pictures.
constexpr int shown = 12;
std::size_t place(int i) { return static_cast<std::size_t>(i) * 7 % 36; }
mlkit::matrix<float> some(const image_set& images) {
  std::vector<index_t> places;
  for (int i = 0; i < shown; ++i) places.push_back(static_cast<index_t>(place(i)));
  return std::move(images.at(places).pixels);
}
std::vector<std::string> some(const std::vector<sprite>& wanted) {
  std::vector<std::string> captions;
  for (int i = 0; i < shown; ++i) captions.push_back(caption(wanted[place(i)]));
  return captions;
}

// By guidance, strength or name: a value for each seed.
template <class Knob>
using values_by = std::map<Knob, std::vector<double>>;

// Unseen combinations at growing guidance; 0 is the model without a caption.
void guidance(const studio& s, report& report) {
  constexpr std::size_t attributes = sprite::attributes;
  values_by<double> shares[attributes + 1];
  std::vector<double> shuffled[attributes];
  sprite_rows strip("Unseen combinations, by guidance", some(s.unseen));
  progress bar("samples by guidance", 6 * s.chosen.runs);
  for (const double g : {0.0, 1.0, 2.0, s.chosen.guidance, 6.0, 12.0})
    for (int run = 0; run < s.chosen.runs; ++run, bar.next()) {
      const image_set images = s.paint(s.unseen, s.options(run, g));
      const std::vector<double> right = s.judge(images, s.unseen);
      for (std::size_t a = 0; a <= attributes; ++a) shares[a][g].push_back(right[a]);
      if (run == 0) strip.add(number(g, 3), some(images));
      if (g != s.chosen.guidance) continue;
      std::vector<sprite> others = s.unseen;  // captions of other images: what is right by accident
      std::rotate(others.begin(), others.begin() + 13 + run, others.end());
      const std::vector<double> by_accident = s.judge(images, others);
      for (std::size_t a = 0; a < attributes; ++a) shuffled[a].push_back(by_accident[a]);
      if (run == 0)
        write_captioned(s.out / "contact_sheet.png", "Combinations that training did not have", images.pixels,
                        captions(s.unseen), 9);
    }
  strip.write(s.out / "guidance.png");
  std::vector<curve> curves;
  for (std::size_t a = 0; a < attributes; ++a) curves.push_back(means(sprite_attributes[a], shares[a]));
  curves.push_back(means("all four", shares[attributes]));
  write_curves(s.out / "guidance",
               {"Unseen combinations: samples that show what the caption says", "guidance", "share"}, curves);

  constexpr double required[] = {0.9, 0.85, 0.7, 0.95};
  const double chosen = s.chosen.guidance;
  for (std::size_t a = 0; a < attributes; ++a) {
    const std::string name = sprite_attributes[a];
    report.at_least("unseen combinations: " + name + " as in the caption", over(shares[a][chosen]), required[a]);
    report.measured("    as in another's caption", over(shuffled[a]));
    report.measured("    of samples without a caption", over(shares[a][0]));
  }
  values_by<double>& all = shares[attributes];
  report.at_least("all four as in the caption", over(all[chosen]), 0.6);
  report.at_most("    of samples without a caption", over(all[0]), 0.05);
  report.at_least("    more than without guidance by", over(differences(all[chosen], all[1])), 0.03);
}

// A word in the place of the empty caption is what guidance leads away from.
void negative_prompts(const studio& s, report& report) {
  std::vector<sprite> wanted;  // the size is left open
  for (int i = 0; i < 36; ++i) wanted.push_back({i % known_shapes, i / known_shapes, i % values_of(2), -1});
  sprite_rows strip("Negative prompts: the same noise without and with", some(wanted));
  values_by<std::string> named, left;
  std::vector<double> shares, kept;
  progress bar("samples by negative prompt", s.chosen.runs * (1 + values_of(3)));
  for (int run = 0; run < s.chosen.runs; ++run) {
    sampling o = s.options(run, s.chosen.guidance);
    const image_set free = s.paint(wanted, o);
    bar.next();
    if (run == 0) strip.add("none", some(free));
    double before = 0, after = 0;
    for (int size = 0; size < values_of(3); ++size, bar.next()) {
      const std::string word = sprite_sizes[static_cast<std::size_t>(size)];
      const std::vector<sprite> unwelcome(wanted.size(), sprite{.size = size});
      o.negative = s.art.ids(std::vector<std::string>{word});
      const image_set led = s.paint(wanted, o);
      named[word].push_back(s.judge(free, unwelcome)[3]);
      left[word].push_back(s.judge(led, unwelcome)[3]);
      before += named[word].back(), after += left[word].back();
      kept.push_back(s.judge(led, wanted)[0]);
      if (run == 0) strip.add("not " + word, some(led));
    }
    shares.push_back(after / before);
  }
  strip.write(s.out / "negative_prompts.png");
  for (const auto& [word, free] : named) {
    report.measured("\"" + word + "\" where the caption leaves it open", over(free));
    report.measured("    with it as the negative prompt", over(left[word]));
  }
  report.at_most("negative prompts leave, of what they name, the share", over(shares), 0.7);
  report.at_least("    and the shape as in the caption", over(kept), 0.8);
}

// The same noise, captions and number of steps for each sampler.
void samplers(const studio& s, report& report) {
  sprite_rows strip("The same noise by each sampler, in " + std::to_string(s.chosen.steps) + " steps", some(s.unseen));
  values_by<std::string> followed, apart;
  progress bar("samples by sampler", 4 * s.chosen.runs);
  for (int run = 0; run < s.chosen.runs; ++run) {
    sampling o = s.options(run, s.chosen.guidance);
    o.steps = 100;
    const image_set exact = s.paint(s.unseen, o, nn::ddim{});  // nearly without error
    bar.next();
    o.steps = s.chosen.steps;
    const auto judge = [&](const std::string& name, const auto& sampler) {
      const image_set images = s.paint(s.unseen, o, sampler);
      if (run == 0) strip.add(name, some(images));
      followed[name].push_back(s.judge(images, s.unseen)[4]);
      apart[name].push_back(distance(images.pixels, exact.pixels));
      bar.next();
    };
    judge("DDPM", nn::ddpm{});
    judge("DDIM", nn::ddim{});
    judge("DPM-Solver++", nn::dpm_solver{});
    if (run == 0) strip.add("DDIM, 100", some(exact));
  }
  strip.write(s.out / "samplers.png");
  for (const auto& [name, shares] : followed) report.measured(name + ": all four as in the caption", over(shares));
  report.measured("    DDIM's distance to its own 100 steps", over(apart["DDIM"]));
  report.at_most("    DPM-Solver++'s over DDIM's, in as many steps", over(ratios(apart["DPM-Solver++"], apart["DDIM"])),
                 1);
}

// Drawings as the start. The strength is the share of the steps that are taken.
void image_to_image(const studio& s, report& report) {
  std::vector<sprite> from, to;
  for (int i = 0; i < 36; ++i) {
    from.push_back({i % known_shapes, i / known_shapes, 0, 1});
    to.push_back({i % known_shapes, (i / known_shapes + 2) % values_of(1), 1 + i % 2, 1});
  }
  const image_set start = draw(from, 1, s.seed + 50).with_attributes();
  const auto ids = s.art.ids(to);
  values_by<double> apart, followed;
  std::vector<double> noise_apart, noise_followed;  // without a start
  sprite_rows strip("Image to image: drawings and new captions, by strength", some(to));
  strip.add("start", some(start));
  progress bar("samples by strength", 7 * s.chosen.runs);
  for (int run = 0; run < s.chosen.runs; ++run) {
    sampling o = s.options(run, s.chosen.guidance);
    o.steps = 20;
    const image_set alone = s.paint(to, o);
    noise_apart.push_back(distance(alone.pixels, start.pixels)), noise_followed.push_back(s.judge(alone, to)[4]);
    bar.next();
    for (const double strength : {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}) {
      image_set images{mlkit::matrix<float>(start.pixels.extents()), ids};
      nn::img2img<float>(s.exec, guided(s.exec, s.art.model, ids, o), nn::dpm_solver{}, s.art.schedule, start.pixels,
                         strength, images.pixels, {.steps = o.steps, .predicts = s.art.model.predicts, .seed = o.seed});
      apart[strength].push_back(distance(images.pixels, start.pixels));
      followed[strength].push_back(s.judge(images, to)[4]);
      if (run == 0) strip.add(number(strength, 3), some(images));
      bar.next();
    }
  }
  strip.write(s.out / "img2img.png");
  write_curves(s.out / "img2img", {"Image to image", "strength", "root mean square, share"},
               {means("distance to the start", apart), means("all four as in the caption", followed)});
  bool grows = true;
  for (auto at = std::next(apart.begin()); at != apart.end(); ++at)
    for (const double more : differences(at->second, std::prev(at)->second)) grows = grows && more > 0;
  report.at_most("img2img: distance to the input at strength 0", over(apart[0]), 0);
  report.holds("    it grows with every strength, on every seed", grows);
  report.measured("    at strength 1", over(apart[1]));
  report.measured("    of samples from noise alone", over(noise_apart));
  report.at_most("    at strength 0.4, over that of samples from noise alone", over(ratios(apart[0.4], noise_apart)),
                 0.8);
  report.measured("    the new caption is followed at strength 0", over(followed[0]));
  report.at_least("    at strength 1", over(followed[1]), 0.6);
  report.measured("    by samples from noise alone", over(noise_followed));
}

int demonstrate(const app& app, const settings& chosen) {
  studio s{app.exec(), chosen, app.seed, app.out};
  report report;
  const auto real = draw(s.unseen, 10, s.seed + 2).with_attributes();
  const auto trusted = s.probe.accuracies(s.exec, real);
  for (std::size_t a = 0; a < trusted.size(); ++a)
    report.at_least("the probe, on new drawings: " + std::string(sprite_attributes[a]), trusted[a], 0.93);

  const training_result result = s.art.train(s.exec, chosen.training, s.seed);
  nn::save((s.out / "base.safetensors").string(), s.art.model.store());
  s.art.words.save((s.out / "words.txt").string());
  report.measured("training", result.steps_per_second(), "steps/s");
  write_curves(s.out / "training", {"Training", "step", "loss"}, {smoothed("loss", result.losses, 25)});

  guidance(s, report);
  negative_prompts(s, report);
  samplers(s, report);
  image_to_image(s, report);
  return report.finish(s.out);
}

// --prompt: pictures of one's own captions by the base of an earlier run.
int paint_only(const app& app, const settings& chosen) {
  game_art art(app.seed);
  nn::load((app.out / "base.safetensors").string(), art.model.store());
  for (const std::string& text : chosen.prompts)
    for (const std::string& word : nn::word_tokenizer::split(text))
      if (art.words.id(word) == nn::word_tokenizer::unknown)
        throw mlkit::value_error("--prompt: \"" + word + "\" is no word of a caption; words.txt lists them");
  sampling o{.steps = chosen.steps, .guidance = chosen.guidance, .seed = app.seed};
  o.negative = art.ids(std::vector{chosen.negative});
  const image_set images = sample(app.exec(), art.model, art.schedule, art.ids(chosen.prompts), o, nn::dpm_solver{});
  write_captioned(app.out / "prompts.png", "Your captions", images.pixels, chosen.prompts, 9);
  return 0;
}

int main(int argc, char** argv) {
  app app("05_game_art", "Diffusion for game art: items from captions, by every knob of sampling.");
  settings s;
  auto& cli = app.options();
  const CLI::Range positive(1, 1 << 20);
  cli.add_option("--training", s.training, "steps of training")->check(positive)->capture_default_str();
  cli.add_option("--steps", s.steps, "steps of sampling")->check(CLI::Range(1, 1000))->capture_default_str();
  cli.add_option("--guidance", s.guidance, "1: none")->capture_default_str();
  cli.add_option("--runs", s.runs, "seeds of sampling")->check(positive)->capture_default_str();
  auto* prompts = cli.add_option("--prompt", s.prompts, "only draw these captions, by the base that is in --out");
  cli.add_option("--negative", s.negative, "a negative prompt for them")->needs(prompts);
  return app.run(argc, argv, [&] { return s.prompts.empty() ? demonstrate(app, s) : paint_only(app, s); });
}
