#include "sprites.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace examples {

using mlkit::index_t;

namespace {

using rgb = std::array<float, 3>;  // in [0, 1]

constexpr rgb ground{0.11f, 0.12f, 0.17f}, wood{0.55f, 0.36f, 0.20f}, gold{0.86f, 0.66f, 0.22f},
    glass{0.66f, 0.78f, 0.82f}, cork{0.72f, 0.56f, 0.38f};
constexpr rgb bodies[] = {{0.85f, 0.20f, 0.20f}, {0.22f, 0.66f, 0.28f}, {0.22f, 0.42f, 0.88f},
                          {0.96f, 0.80f, 0.18f}, {0.60f, 0.28f, 0.80f}, {0.92f, 0.92f, 0.94f}};

rgb mix(const rgb& a, const rgb& b, float share) {
  rgb c;
  for (std::size_t i = 0; i < 3; ++i) c[i] = a[i] + share * (b[i] - a[i]);
  return c;
}

// What is at a place of a shape, in coordinates of its own: x and y in [-1, 1], y downwards.
enum class part { nothing, body, shade, wooden, golden, glassy, corky };

part sword(float x, float y) {
  const float along = y;
  if (along < 0.36f && along > -1.25f && std::abs(x) < std::min(0.30f, 0.75f * (along + 1.25f)))
    return x > 0.12f ? part::shade : part::body;
  if (along >= 0.36f && along < 0.60f && std::abs(x) < 0.62f) return part::golden;
  if (along >= 0.60f && along < 1.20f && std::abs(x) < 0.17f) return part::wooden;
  return part::nothing;
}

part shield(float x, float y) {
  const auto inside = [](float u, float v, float scale) {
    u /= scale, v /= scale;
    if (v < -0.95f || v > 1.0f) return false;
    const float width = v < 0 ? 0.85f : 0.85f * std::sqrt(std::max(0.0f, 1 - v * v));
    return std::abs(u) < width;
  };
  if (inside(x, y, 0.76f)) return x > 0.22f ? part::shade : part::body;
  return inside(x, y, 1) ? part::golden : part::nothing;
}

part potion(float x, float y) {
  if (y < -0.72f) return y > -1.0f && std::abs(x) < 0.26f ? part::corky : part::nothing;
  if (y < -0.30f) return std::abs(x) < 0.22f ? part::glassy : part::nothing;
  const float radius = std::hypot(x, y - 0.32f);
  if (radius < 0.54f && y > 0.02f) return x > 0.2f ? part::shade : part::body;
  return radius < 0.70f ? part::glassy : part::nothing;
}

part coin(float x, float y) {
  const float radius = std::hypot(x, y);
  if (radius > 0.88f) return part::nothing;
  if (radius > 0.64f) return part::shade;
  return part::body;
}

part gem(float x, float y) {
  if (y < -0.68f || y > 0.95f) return part::nothing;
  const float width = y < -0.20f ? 0.55f + (y + 0.68f) * 0.9f : 0.98f * (0.95f - y) / 1.15f;
  if (std::abs(x) > width) return part::nothing;
  return y < -0.20f || x > 0.35f * (0.95f - y) ? part::shade : part::body;
}

part key(float x, float y) {
  const float radius = std::hypot(x, y + 0.62f);
  if (radius < 0.58f) return radius > 0.24f ? (x > 0.25f ? part::shade : part::body) : part::nothing;
  if (std::abs(x) < 0.17f && y > -0.2f && y < 1.15f) return part::body;
  if (x > 0 && x < 0.58f && ((y > 0.42f && y < 0.66f) || (y > 0.88f && y < 1.15f))) return part::shade;
  return part::nothing;
}

part crown(float x, float y) {
  if (std::abs(x) > 0.95f || y > 0.75f) return part::nothing;
  if (y > 0.40f) return part::golden;
  const float tooth = std::abs(std::fmod(std::abs(x) + 0.4f, 0.8f) - 0.4f) / 0.4f;  // 0 at a tip, 1 between
  return y > -0.75f + 0.95f * tooth ? (x > 0.4f ? part::shade : part::body) : part::nothing;
}

constexpr part (*shape_functions[])(float, float) = {sword, shield, potion, coin, gem, key, crown};

}  // namespace

int values_of(int attribute) {
  constexpr std::array counts{sprite_shapes.size(), sprite_colours.size(), sprite_patterns.size(), sprite_sizes.size()};
  return static_cast<int>(counts[static_cast<std::size_t>(attribute)]);
}

std::string caption(const sprite& s) {
  std::string text;
  const auto add = [&](const auto& names, int value) {
    if (value >= 0) text += (text.empty() ? "" : " ") + std::string(names[static_cast<std::size_t>(value)]);
  };
  add(sprite_sizes, s.size);
  add(sprite_colours, s.colour);
  add(sprite_patterns, s.pattern);
  add(sprite_shapes, s.shape);
  return text;
}

std::vector<std::string> captions(const std::vector<sprite>& sprites) {
  std::vector<std::string> texts;
  for (const sprite& s : sprites) texts.push_back(caption(s));
  return texts;
}

bool held_out(const sprite& s) { return (s.shape + s.colour + 2 * s.pattern + 3 * s.size) % 6 == 0; }

std::vector<sprite> combinations(bool that_are_held_out) {
  std::vector<sprite> all;
  for (int shape = 0; shape < known_shapes; ++shape)
    for (int colour = 0; colour < values_of(1); ++colour)
      for (int pattern = 0; pattern < values_of(2); ++pattern)
        for (int size = 0; size < values_of(3); ++size)
          if (const sprite s{shape, colour, pattern, size}; held_out(s) == that_are_held_out) all.push_back(s);
  return all;
}

sprite draw(sprite s, mlkit::random_stream random, float* pixels) {
  std::uint64_t drawn = 0;
  const auto uniform = [&](float low, float high) { return low + (high - low) * random.uniform(drawn++); };
  const auto choose = [&](int given, int count) {
    const int other = static_cast<int>(uniform(0, static_cast<float>(count)));
    return given >= 0 ? given : other;
  };
  s = {choose(s.shape, known_shapes), choose(s.colour, values_of(1)), choose(s.pattern, values_of(2)),
       choose(s.size, values_of(3))};
  const bool tilted = s.shape == 0 || s.shape == 5;  // swords and keys lie along the diagonal
  const float x0 = uniform(-0.5f, 0.5f), y0 = uniform(-0.5f, 0.5f),
              scale = uniform(0.95f, 1.05f) * (s.size ? 7.4f : 4.7f);
  const float angle = uniform(-0.08f, 0.08f) + (tilted ? 0.25f * std::numbers::pi_v<float> : 0);
  rgb body = bodies[s.colour];
  for (float& c : body) c = std::clamp(c + uniform(-0.04f, 0.04f), 0.0f, 1.0f);
  const rgb light = s.colour == 5 ? rgb{0.45f, 0.47f, 0.52f} : mix(body, {1, 1, 1}, 0.75f);  // of stripes and dots
  const float c = std::cos(angle), d = std::sin(angle);

  const auto colour_at = [&](float x, float y) {
    const float u = (c * x + d * y) / scale, v = (-d * x + c * y) / scale;
    const auto marked = [&] {
      const float p = u * scale, q = v * scale;  // patterns are as coarse on small sprites as on large ones
      if (s.pattern == 1) return q - 4 * std::floor(q / 4) < 2;
      const auto off = [](float w) { return w - 3.6f * std::round(w / 3.6f); };
      return s.pattern == 2 && std::hypot(off(p), off(q)) < 1.15f;
    };
    switch (shape_functions[s.shape](u, v)) {
      case part::body: return marked() ? light : body;
      case part::shade: return mix(marked() ? light : body, {0, 0, 0}, 0.28f);
      case part::wooden: return wood;
      case part::golden: return gold;
      case part::glassy: return glass;
      case part::corky: return cork;
      default: return ground;
    }
  };
  constexpr int samples = 4;  // by 4 in a pixel
  constexpr float centre = 0.5f * static_cast<float>(sprite_side);
  for (index_t row = 0; row < sprite_side; ++row)
    for (index_t column = 0; column < sprite_side; ++column) {
      rgb sum{};
      for (int i = 0; i < samples * samples; ++i) {
        const float x = static_cast<float>(column) + (static_cast<float>(i % samples) + 0.5f) / samples - centre - x0;
        const float y = static_cast<float>(row) + (static_cast<float>(i / samples) + 0.5f) / samples - centre - y0;
        const rgb here = colour_at(x, y);
        for (std::size_t k = 0; k < 3; ++k) sum[k] += here[k];
      }
      for (const float value : sum) *pixels++ = 2 * value / (samples * samples) - 1;
    }
  return s;
}

bool is_ground(const float* pixel) {
  for (std::size_t i = 0; i < 3; ++i)
    if (std::abs((pixel[i] + 1) / 2 - ground[i]) > 0.2f) return false;
  return true;
}

image_set sprite_set::with_attributes() const {
  image_set images{mlkit::matrix<float>(pixels.extents()), {}};
  std::copy(pixels.begin(), pixels.end(), images.pixels.begin());
  for (const sprite& s : shows)
    for (int a = 0; a < sprite::attributes; ++a) images.labels.push_back(s[a]);
  return images;
}

sprite_set draw(const std::vector<sprite>& wanted, index_t each, std::uint64_t seed) {
  sprite_set set{mlkit::matrix<float>({static_cast<index_t>(wanted.size()) * each, sprite_pixels}), {}};
  for (index_t i = 0; i < set.count(); ++i)
    set.shows.push_back(
        draw(wanted[static_cast<std::size_t>(i / each)], {seed, static_cast<std::uint64_t>(i)}, &set.pixels(i, 0)));
  return set;
}

}  // namespace examples
