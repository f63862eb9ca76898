#include "picture.hpp"

#include <mlkit/core/error.hpp>

#include <algorithm>
#include <cmath>
#include <cstring>

#define STB_IMAGE_WRITE_IMPLEMENTATION
#include <stb_image_write.h>

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-function"
#endif
#include <stb_easy_font.h>
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

void picture::text(int x, int y, const std::string& s, colour c, int size) {
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
  return stb_easy_font_width(const_cast<char*>(s.c_str())) * size;
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
      const auto level = static_cast<std::uint8_t>(std::lround(std::clamp((value + 1) * 127.5f, 0.0f, 255.0f)));
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
