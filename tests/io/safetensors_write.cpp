#include <catch2/catch.hpp>

#include "support.hpp"
#include "test_data.hpp"

#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstring>
#include <limits>
#include <numeric>

using namespace mlkit;
using Catch::Contains;

TEST_CASE("files of the safetensors package are reproduced byte for byte", "[io]") {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(test_data()))
    if (entry.path().extension() == ".safetensors") names.push_back(entry.path().string());
  REQUIRE(names.size() > 20);
  temporary_directory folder;
  for (const std::string& name : names) {
    CAPTURE(name);
    const auto file = io::safetensors::open(name);
    std::vector<io::tensor_info> tensors = file.tensors();
    std::reverse(tensors.begin(), tensors.end());  // the order given must not matter
    io::write_safetensors(folder / "out", tensors, file.metadata());
    const std::string original = contents(name);
    CHECK(contents(folder / "out") == original);
    const auto bytes = io::safetensors_bytes(tensors, file.metadata());
    REQUIRE(bytes.size() == original.size());
    CHECK(std::memcmp(bytes.data(), original.data(), bytes.size()) == 0);
  }
  CHECK(folder.files() == 1);
}

TEST_CASE("views, containers and strided views are written", "[io]") {
  temporary_directory folder;
  tensor<double, 2> m({2, 3});
  std::iota(m.begin(), m.end(), 0.0);
  const std::vector<float> v{1, 2, 3};
  const std::int64_t ids[] = {5, -6};
  const auto half = tensor<f16, 1>::of({2}, {0.5f, -1});
  io::write_safetensors(folder / "x",
                        {io::named("m", m), io::named("t", transposed(m)), io::named("v", v), io::named("half", half),
                         io::named("ids", tensor_view<const std::int64_t, 1>(ids, {2})), io::named_scalar("s", 2.5f),
                         io::named("none", tensor<float, 2>({0, 7}))},
                        {{"k\n", "\xc3\xa9"}});
  const auto file = io::safetensors::open(folder / "x");
  CHECK(file.metadata().at("k\n") == "\xc3\xa9");
  CHECK(file.view<double, 2>("m")(1, 2) == 5);
  const auto t = file.view<double, 2>("t");
  CHECK(t.extents == extents_t<2>{3, 2});
  CHECK((t(0, 1) == 3 && t(2, 0) == 2 && t(2, 1) == 5));
  CHECK(file.view<float, 1>("v")(2) == 3);
  CHECK(file.view<f16, 1>("half")(1) == -1);
  CHECK(file.view<std::int64_t, 1>("ids")(1) == -6);
  CHECK(file.at("s").scalar() == 2.5);
  CHECK(file.view<float, 2>("none").extents == extents_t<2>{0, 7});
  // Data begins at a multiple of 8 and every tensor is aligned to its elements.
  for (const auto& info : file)
    CHECK(reinterpret_cast<std::uintptr_t>(info.data) % static_cast<std::size_t>(io::bits_of(info.dtype) / 8) == 0);
}

TEST_CASE("what a file cannot hold is refused before anything is written", "[io]") {
  temporary_directory folder;
  const std::vector<float> v{1, 2, 3};
  const auto write = [&](std::vector<io::tensor_info> tensors, std::map<std::string, std::string> metadata = {}) {
    io::write_safetensors(folder / "x", tensors, metadata);
  };
  CHECK_THAT(message_of<value_error>([&] { write({io::named("a", v), io::named("a", v)}); }), Contains("named \"a\""));
  CHECK_THAT(message_of<value_error>([&] { write({io::named("__metadata__", v)}); }), Contains("is reserved"));
  CHECK_THAT(message_of<value_error>([&] { write({io::named("\xff", v)}); }), Contains("not valid UTF-8"));
  CHECK_THAT(message_of<value_error>([&] { write({}, {{"a", "\xff"}}); }), Contains("not valid UTF-8"));
  auto info = io::named("a", v);
  info.shape = {4};
  CHECK_THAT(message_of<shape_error>([&] { write({info}); }), Contains("takes 16 bytes, but has 12"));
  info.shape = {-3};
  CHECK_THAT(message_of<shape_error>([&] { write({info}); }), Contains("negative or too large"));
  info.shape = {std::numeric_limits<index_t>::max(), 5};
  CHECK_THAT(message_of<shape_error>([&] { write({info}); }), Contains("negative or too large"));
  info.shape = {3};
  info.data = nullptr;
  CHECK_THAT(message_of<value_error>([&] { write({info}); }), Contains("is null, but has 12 bytes"));
  CHECK_THAT(message_of<value_error>([&] { io::named("n", tensor_view<const float, 1>(nullptr, {2})); }),
             Contains("null"));
  CHECK(folder.files() == 0);
}

TEST_CASE("a file is replaced as a whole and keeps its mode and links", "[io]") {
  temporary_directory folder;
  const std::vector<float> v{1};
  store(folder / "x", "old");
  REQUIRE(::chmod((folder / "x").c_str(), 0640) == 0);
  std::filesystem::create_symlink("x", folder / "link");
  io::write_safetensors(folder / "link", {io::named("a", v)});
  CHECK(std::filesystem::is_symlink(folder / "link"));
  CHECK(io::safetensors::open(folder / "x").contains("a"));
  struct stat status {};
  REQUIRE(::stat((folder / "x").c_str(), &status) == 0);
  CHECK((status.st_mode & 0777) == 0640);
  // A file may be the source of its own replacement.
  const auto file = io::safetensors::open(folder / "x");
  io::write_safetensors(folder / "x", file.tensors(), {{"again", "yes"}});
  CHECK(io::safetensors::open(folder / "x").metadata().at("again") == "yes");
  CHECK(folder.files() == 2);
}

TEST_CASE("targets that cannot be written are refused and left alone", "[io]") {
  temporary_directory folder;
  const std::vector<float> v{1};
  const auto write = [&](const std::string& path) {
    return io_failure([&] { io::write_safetensors(path, {io::named("a", v)}); });
  };
  CHECK_THAT(write(folder / "none/x"), Contains("cannot create"));
  CHECK_THAT(write(folder.path.string()), Contains("is not a regular file"));
  CHECK_THAT(write("/dev/full"), Contains("is not a regular file"));
  CHECK_THAT(write((folder / "x") + "/"), Contains("names no file"));
  std::filesystem::create_symlink("nowhere", folder / "broken");
  CHECK_THAT(write(folder / "broken"), Contains("cannot follow the link"));
  CHECK(folder.files() == 1);
}

TEST_CASE("a full disk is an error that leaves the old file and nothing else", "[io]") {
  temporary_directory folder;
  const std::vector<float> small{1}, large(1 << 20);
  io::write_safetensors(folder / "x", {io::named("old", small)});
  // In a child, because the limit is for the whole process.
  const pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::signal(SIGXFSZ, SIG_IGN);
    const rlimit limit{1 << 16, 1 << 16};
    ::setrlimit(RLIMIT_FSIZE, &limit);
    int result = 1;
    try {
      io::write_safetensors(folder / "x", {io::named("new", large)});
    } catch (const io_error& e) {
      result = std::strstr(e.what(), "cannot write") ? 0 : 2;
    }
    ::_exit(result);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  REQUIRE(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  CHECK(folder.files() == 1);
  CHECK(io::safetensors::open(folder / "x").contains("old"));
}

TEST_CASE("a writer that is killed leaves a whole file or none", "[io]") {
  temporary_directory folder;
  const std::vector<float> payload(1 << 20, 1.0f);
  int killed_while_writing = 0;
  for (int round = 0; round < 30; ++round) {
    const bool exists = round % 2 == 1;
    const std::string path = folder / ("x" + std::to_string(round));
    if (exists) io::write_safetensors(path, {io::named("old", payload)});
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      for (;;) io::write_safetensors(path, {io::named("new", payload)});
    }
    ::usleep(static_cast<useconds_t>(200 + 700 * round));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    if (!exists && !std::filesystem::exists(path)) {
      ++killed_while_writing;
      continue;
    }
    const auto file = io::safetensors::open(path);  // throws unless whole
    REQUIRE(file.size() == 1);
    CHECK(file.tensors()[0].bytes == payload.size() * sizeof(float));
    CHECK((file.contains("new") || (exists && file.contains("old"))));
    for (const auto& entry : std::filesystem::directory_iterator(folder.path))
      killed_while_writing += entry.path().extension() == ".tmp" && std::filesystem::remove(entry.path());
  }
  CHECK(killed_while_writing > 0);  // else the test has shown nothing
}
