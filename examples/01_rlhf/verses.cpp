#include "verses.hpp"

#include <fstream>

namespace examples {

namespace {

std::vector<std::string> lines_of(const std::filesystem::path& path) {
  std::ifstream file(path);
  std::vector<std::string> lines;
  for (std::string line; std::getline(file, line);)
    if (!line.empty()) lines.push_back(line);
  constexpr std::size_t fewest = 200;
  if (lines.size() < fewest)
    throw mlkit::io_error(path.string() + " has " + std::to_string(lines.size()) + " lines, but " +
                          std::to_string(fewest) + " are needed");
  return lines;
}

}  // namespace

verses::verses(const std::filesystem::path& file) : words({}) {
  const std::vector<std::string> lines = lines_of(file);
  const auto is_held_out = [](std::size_t i) { return i % 8 == 7; };
  std::vector<std::string> seen;
  for (std::size_t i = 0; i < lines.size(); ++i)
    if (!is_held_out(i)) seen.push_back(lines[i]);
  words = nn::byte_pair_tokenizer::from_texts(seen, vocabulary);
  for (std::size_t i = 0; i < lines.size(); ++i) {
    token_list ids = words.encode(lines[i]);
    ids.insert(ids.begin(), nn::byte_pair_tokenizer::end);
    ids.push_back(nn::byte_pair_tokenizer::end);
    if (ids.size() > static_cast<std::size_t>(context)) continue;
    (is_held_out(i) ? held_out : training).push_back({.ids = ids});
    if (ids.size() < 2 * static_cast<std::size_t>(prompt_tokens)) continue;
    prompt p;
    p.ids.assign(ids.begin(), ids.begin() + prompt_tokens);
    const auto text = [&](std::size_t from, std::size_t to) {
      return words.decode(std::span(ids).subspan(from, to - from));
    };
    p.text = text(1, static_cast<std::size_t>(prompt_tokens));
    p.rest = text(static_cast<std::size_t>(prompt_tokens), ids.size());
    (is_held_out(i) ? held_out_prompts : training_prompts).push_back(std::move(p));
  }
}

}  // namespace examples
