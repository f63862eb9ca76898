// Reads the files of tests/data that hold a tensor to a line.
#pragma once

#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "test_data.hpp"

inline const std::vector<double>& fixture(const std::string& name, const std::string& file = "nn_fixtures.txt") {
  static std::map<std::string, std::map<std::string, std::vector<double>>> files;
  auto& tensors = files[file];
  if (tensors.empty()) {
    std::ifstream lines(test_data(file));
    for (std::string line; std::getline(lines, line);) {
      std::istringstream words(line);
      std::string key, word;
      std::size_t count = 0;
      words >> key >> count;
      std::vector<double>& values = tensors[key];
      while (words >> word) values.push_back(std::stod(word));  // which reads infinities too
      if (values.size() != count) throw std::runtime_error(key + " in " + file + " has not " + std::to_string(count));
    }
  }
  const auto it = tensors.find(name);
  if (it == tensors.end()) throw std::runtime_error("no fixture of " + file + " is named " + name);
  return it->second;
}
