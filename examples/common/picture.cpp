#include "picture.hpp"

#include <mlkit/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <fstream>
#include <iterator>

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb_image_write.h>

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include <stb_easy_font.h>
#define STB_TRUETYPE_IMPLEMENTATION
#define STBTT_STATIC
#include <stb_truetype.h>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

namespace examples {

picture::picture(int width, int height, colour background)
    : width_(width), height_(height), pixels_(static_cast<std::size_t>(width) * static_cast<std::size_t>(height) * 3) {
  fill(0, 0, width, height, background);
}

void picture::fill(int x, int y, int w, int h, colour c) {
  for (int row = std::max(0, y); row < std::min(height_, y + h); ++row)
    for (int column = std::max(0, x); column < std::min(width_, x + w); ++column)
      std::copy(c.begin(), c.end(), pixels_.begin() + (static_cast<std::ptrdiff_t>(row) * width_ + column) * 3);
}

namespace {

// A typeface of the system's, from where Debian puts it; without it, text is drawn in stb_easy_font's strokes.
class typeface {
 public:
  static const typeface& instance() {
    static const typeface face;
    return face;
  }
  explicit operator bool() const { return !file_.empty(); }

  // Calls draw(x, y, coverage) for every pixel that a line of `height` pixels touches; the width of the line.
  template <class Draw>
  int line(const std::string& s, float height, const Draw& draw) const {
    const float scale = stbtt_ScaleForPixelHeight(&font_, height);
    int ascent = 0;
    stbtt_GetFontVMetrics(&font_, &ascent, nullptr, nullptr);
    float at = 0;
    std::vector<unsigned char> glyph;
    for (std::size_t i = 0; i < s.size(); ++i) {
      int x0, y0, x1, y1, advance, bearing;
      const float part = at - std::floor(at);
      stbtt_GetCodepointBitmapBoxSubpixel(&font_, s[i], scale, scale, part, 0, &x0, &y0, &x1, &y1);
      const int w = x1 - x0, h = y1 - y0;
      glyph.assign(static_cast<std::size_t>(std::max(0, w * h)), 0);
      if (!glyph.empty()) stbtt_MakeCodepointBitmapSubpixel(&font_, glyph.data(), w, h, w, scale, scale, part, 0, s[i]);
      for (int y = 0; y < h; ++y)
        for (int x = 0; x < w; ++x)
          if (const unsigned char c = glyph[static_cast<std::size_t>(y * w + x)])
            draw(static_cast<int>(std::floor(at)) + x0 + x,
                 static_cast<int>(std::lround(scale * static_cast<float>(ascent))) + y0 + y, c);
      stbtt_GetCodepointHMetrics(&font_, s[i], &advance, &bearing);
      if (i + 1 < s.size()) advance += stbtt_GetCodepointKernAdvance(&font_, s[i], s[i + 1]);
      at += scale * static_cast<float>(advance);
    }
    return static_cast<int>(std::ceil(at));
  }

 private:
  typeface() {
    std::ifstream file("/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf", std::ios::binary);
    file_.assign(std::istreambuf_iterator<char>(file), {});
    const auto* bytes = reinterpret_cast<const unsigned char*>(file_.data());
    if (!file_.empty() && !stbtt_InitFont(&font_, bytes, 0)) file_.clear();
  }

  std::string file_;
  stbtt_fontinfo font_{};
};

constexpr float line_height = 9.5f;  // of a text of size 1 in the typeface, which fills it as stb_easy_font fills 12

}  // namespace

void picture::text(int x, int y, const std::string& s, colour c, int size) {
  if (const typeface& face = typeface::instance()) {
    face.line(s, line_height * static_cast<float>(size), [&](int dx, int dy, unsigned char coverage) {
      const int column = x + dx, row = y + dy;
      if (column < 0 || row < 0 || column >= width_ || row >= height_) return;
      std::uint8_t* pixel = &pixels_[(static_cast<std::size_t>(row) * static_cast<std::size_t>(width_) +
                                      static_cast<std::size_t>(column)) *
                                     3];
      for (std::size_t k = 0; k < 3; ++k)
        pixel[k] = static_cast<std::uint8_t>((pixel[k] * (255 - coverage) + c[k] * coverage) / 255);
    });
    return;
  }
  struct vertex {  // what stb_easy_font writes
    float x, y, z;
    std::uint8_t colour[4];
  };
  std::vector<vertex> corners(s.size() * 80 + 4);
  const int quads = stb_easy_font_print(0, 0, const_cast<char*>(s.c_str()), nullptr, corners.data(),
                                        static_cast<int>(corners.size() * sizeof(vertex)));
  for (int q = 0; q < quads; ++q) {
    const vertex &a = corners[static_cast<std::size_t>(4 * q)], &b = corners[static_cast<std::size_t>(4 * q + 2)];
    const auto pixel = [&](float v) { return static_cast<int>(std::lround(v)) * size; };
    fill(x + pixel(a.x), y + pixel(a.y), pixel(b.x) - pixel(a.x), pixel(b.y) - pixel(a.y), c);
  }
}

int picture::text_width(const std::string& s, int size) {
  if (const typeface& face = typeface::instance())
    return face.line(s, line_height * static_cast<float>(size), [](int, int, unsigned char) {});
  return stb_easy_font_width(const_cast<char*>(s.c_str())) * size;
}

namespace {

std::uint8_t level_of(float value) {
  return static_cast<std::uint8_t>(std::lround(std::clamp((value + 1) * 127.5f, 0.0f, 255.0f)));
}

}  // namespace

void picture::rgb(int x, int y, mlkit::vector_view<const float> values, int zoom) {
  const auto side = static_cast<int>(std::lround(std::sqrt(static_cast<double>(values.extent(0)) / 3)));
  for (int r = 0; r < side; ++r)
    for (int c = 0; c < side; ++c) {
      const mlkit::index_t at = 3 * (r * side + c);
      fill(x + c * zoom, y + r * zoom, zoom, zoom,
           {level_of(values(at)), level_of(values(at + 1)), level_of(values(at + 2))});
    }
}

void picture::grey(int x, int y, mlkit::matrix_view<const float> image, int zoom) {
  const auto rows = static_cast<int>(image.extent(0)), columns = static_cast<int>(image.extent(1));
  for (int r = 0; r < rows * zoom; ++r)
    for (int c = 0; c < columns * zoom; ++c) {
      // The centre of this pixel in the image's own, whose centres are at whole numbers.
      const auto place = [&](int at, int count) {
        return std::clamp((static_cast<float>(at) + 0.5f) / static_cast<float>(zoom) - 0.5f, 0.0f,
                          static_cast<float>(count - 1));
      };
      const float v = place(r, rows), u = place(c, columns);
      const int r0 = static_cast<int>(v), c0 = static_cast<int>(u), r1 = std::min(r0 + 1, rows - 1),
                c1 = std::min(c0 + 1, columns - 1);
      const float fv = v - static_cast<float>(r0), fu = u - static_cast<float>(c0);
      const float value = (1 - fv) * ((1 - fu) * image(r0, c0) + fu * image(r0, c1)) +
                          fv * ((1 - fu) * image(r1, c0) + fu * image(r1, c1));
      const std::uint8_t level = level_of(value);
      fill(x + c, y + r, 1, 1, {level, level, level});
    }
}

void picture::write_png(const std::filesystem::path& path) const {
  if (!stbi_write_png(path.string().c_str(), width_, height_, 3, pixels_.data(), width_ * 3))
    throw mlkit::io_error(path.string() + ": cannot be written");
}

picture contact_sheet(const std::string& title, const std::vector<sheet_row>& rows, int zoom) {
  constexpr int margin = 16, gap = 4, size = 2;
  int label = 0, columns = 0, side = 0;
  for (const sheet_row& row : rows) {
    label = std::max(label, picture::text_width(row.label, size));
    columns = std::max(columns, static_cast<int>(row.images.extent(0)));
    side = std::max(side, static_cast<int>(std::lround(std::sqrt(static_cast<double>(row.images.extent(1))))));
  }
  const int tile = side * zoom + gap, left = margin + label + (label ? margin : 0),
            top = margin + 12 * size + margin / 2;
  const int width = std::max(left + columns * tile, margin + picture::text_width(title, size)) + margin;
  picture sheet(width, top + static_cast<int>(rows.size()) * tile + margin);
  sheet.text(margin, margin, title, ink, size);
  for (std::size_t r = 0; r < rows.size(); ++r) {
    const int y = top + static_cast<int>(r) * tile;
    sheet.text(margin, y + (tile - gap - 8 * size) / 2, rows[r].label, muted, size);
    for (mlkit::index_t i = 0; i < rows[r].images.extent(0); ++i)
      sheet.grey(left + static_cast<int>(i) * tile, y, {&rows[r].images(i, 0), {side, side}}, zoom);
  }
  return sheet;
}

}  // namespace examples
