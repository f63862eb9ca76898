// Where tests/data is. A function of test_main, so that no other file's compilation depends on where the repository
// lies.
#pragma once

#include <string>

/// The path of a file of tests/data, or without a name that of the folder.
std::string test_data(const std::string& name = {});
