// The attention projections of Stable Diffusion 1.5's UNet: the weights that its LoRA files usually adapt.
#pragma once

#include <string>
#include <vector>

#include "mlkit/core/config.hpp"

namespace sd15 {

struct projection {
  std::string module;  ///< as diffusers names it
  mlkit::index_t in, out;
};

/// The tokens that a projection has for one image of 512 x 512: those of the text for k and v of cross-attention, else
/// the places of its block, 64 x 64 where it is 320 wide and half of that each way in the next.
inline mlkit::index_t tokens(const projection& p) {
  const bool of_text = p.in != p.out || p.module.ends_with("attn2.to_k") || p.module.ends_with("attn2.to_v");
  constexpr mlkit::index_t text = 77, places = 64 * 64, width = 320;
  return of_text ? text : places * width * width / (p.out * p.out);
}

/// The q, k, v and out projections of all 32 attention modules (128 of them), or of the 16 cross-attentions alone:
/// self- attention is attn1, cross-attention is attn2 and takes k and v from the text, 768 wide. Channels are 320, 640,
/// 1280, 1280 in blocks 0..3; attention stands in down blocks 0..2 (twice each), in the middle, and in up blocks 1..3
/// (three times). (Rombach et al., 2022; the widths are those of the published unet/config.json.)
inline std::vector<projection> attention_projections(bool cross_only = false) {
  constexpr mlkit::index_t text = 768;
  std::vector<projection> all;
  const auto block = [&](const std::string& at, mlkit::index_t width) {
    for (const bool cross : {false, true}) {
      if (cross_only && !cross) continue;
      const std::string attention = at + ".transformer_blocks.0." + (cross ? "attn2" : "attn1");
      const mlkit::index_t source = cross ? text : width;
      all.push_back({attention + ".to_q", width, width});
      all.push_back({attention + ".to_k", source, width});
      all.push_back({attention + ".to_v", source, width});
      all.push_back({attention + ".to_out.0", width, width});
    }
  };
  constexpr mlkit::index_t widths[] = {320, 640, 1280};
  const auto name = [](const char* part, int i, int j) {
    return part + ("." + std::to_string(i)) + ".attentions." + std::to_string(j);
  };
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 2; ++j) block(name("down_blocks", i, j), widths[i]);
  block("mid_block.attentions.0", 1280);
  for (int i = 1; i < 4; ++i)
    for (int j = 0; j < 3; ++j) block(name("up_blocks", i, j), widths[3 - i]);
  return all;
}

}  // namespace sd15
