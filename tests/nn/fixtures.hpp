// Reads tests/data/nn_fixtures.txt: a tensor to a line.
#pragma once

#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

inline const std::vector<double>& fixture(const std::string& name) {
  static const auto all = [] {
    std::map<std::string, std::vector<double>> found;
    std::ifstream file(MLKIT_TEST_DATA "/nn_fixtures.txt");
    for (std::string line; std::getline(file, line);) {
      std::istringstream words(line);
      std::string key;
      std::size_t count = 0;
      words >> key >> count;
      std::vector<double> values(count);
      for (double& v : values) words >> v;
      found[key] = values;
    }
    return found;
  }();
  const auto it = all.find(name);
  if (it == all.end()) throw std::runtime_error("no fixture is named " + name);
  return it->second;
}
