// Game items with captions, drawn by the program: shape, colour, pattern and size, each with a little jitter.
#pragma once

#include "images.hpp"

#include <mlkit/core/random.hpp>

#include <array>
#include <string>

namespace examples {

inline constexpr mlkit::index_t sprite_side = 16, sprite_pixels = sprite_side * sprite_side * 3;

/// What a sprite shows. A value of -1 is left open: captions do not name it.
struct sprite {
  int shape = -1, colour = -1, pattern = -1, size = -1;

  static constexpr int attributes = 4;
  int operator[](int attribute) const {
    return std::array{shape, colour, pattern, size}[static_cast<std::size_t>(attribute)];
  }
  friend bool operator==(const sprite&, const sprite&) = default;
};

inline constexpr std::array sprite_attributes{"shape", "colour", "pattern", "size"};
/// The last shape is kept from the base: example 10 teaches it.
inline constexpr std::array sprite_shapes{"sword", "shield", "potion", "coin", "gem", "key", "crown"};
inline constexpr std::array sprite_colours{"red", "green", "blue", "yellow", "purple", "white"};
inline constexpr std::array sprite_patterns{"plain", "striped", "dotted"};
inline constexpr std::array sprite_sizes{"small", "large"};
inline constexpr int known_shapes = 6, new_shape = 6;

/// How many values an attribute has, with all shapes.
int values_of(int attribute);
/// "small red striped shield", without what is open; all open: "".
std::string caption(const sprite& s);
std::vector<std::string> captions(const std::vector<sprite>& sprites);

/// Whether this combination is kept from training: a sixth of them, of which every pair of values is seen elsewhere.
bool held_out(const sprite& s);
/// All combinations of the known shapes that are held out, or are not.
std::vector<sprite> combinations(bool that_are_held_out);

/// Draws a sprite on a dark ground, moved, turned, scaled and tinted a little; what is open is drawn from `random` too.
/// RGB in [-1, 1], row by row. Returns what was drawn.
sprite draw(sprite s, mlkit::random_stream random, float* pixels);

/// Whether a pixel, RGB in [-1, 1], looks like the ground.
bool is_ground(const float* pixel);

/// Sprites and what they show.
struct sprite_set {
  mlkit::matrix<float> pixels;  // [sprites, sprite_pixels]
  std::vector<sprite> shows;

  mlkit::index_t count() const { return pixels.extent(0); }
  /// The images with their four attributes as labels.
  image_set with_attributes() const;
};

/// `each` drawings of each of these.
sprite_set draw(const std::vector<sprite>& wanted, mlkit::index_t each, std::uint64_t seed);

}  // namespace examples
