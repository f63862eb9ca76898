// The text: verses, cut into tokens, some of them held out; and prompts, which are the beginnings of verses.
#pragma once

#include <mlkit/nn.hpp>
#include <mlkit/nn/byte_pair_tokenizer.hpp>

#include <filesystem>

namespace examples {

namespace nn = mlkit::nn;
using mlkit::index_t;
using token_list = std::vector<std::int32_t>;

/// A verse that was cut off, and how it goes on.
struct prompt {
  token_list ids;    // the end of the text before, which says that a new one begins, and some tokens of the verse
  std::string text;  // of these tokens
  std::string rest;  // of the verse, which no model is given
};

struct verses {
  static constexpr index_t vocabulary = 1536, prompt_tokens = 6, context = 96;

  nn::byte_pair_tokenizer words;
  std::vector<nn::training_text> training, held_out;
  std::vector<prompt> training_prompts, held_out_prompts;

  /// A text file, a verse to a line; every eighth is held out. Throws io_error for a file that cannot be read or has
  /// too few lines that are long enough.
  explicit verses(const std::filesystem::path& file);
  /// Without any text.
  explicit verses(nn::byte_pair_tokenizer known) : words(std::move(known)) {}

  /// The language model that learns them.
  nn::language_model_options model_options(std::uint64_t seed) const {
    return {.vocabulary = words.size(), .context = context, .width = 96, .heads = 4, .blocks = 2, .seed = seed};
  }
};

}  // namespace examples
