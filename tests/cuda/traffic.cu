// Bytes of device memory that kernels ask for, beside those that a call has to move. docs/cuda_traffic.md holds them:
// MLKIT_WRITE_TRAFFIC=1 in the environment writes it anew.
#include <executor.hpp>

#if defined(MLKIT_CUDA_EMULATION)
#include <fstream>
#include <iomanip>
#include <iterator>
#include <mlkit/lora.cuh>
#include <mlkit/rl.cuh>
#include <mlkit_cuda_emulation/testing.hpp>
#include <sstream>
#include <string>

#include "test_data.hpp"

namespace lora = mlkit::lora;
namespace rl = mlkit::rl;
using mlkit::bf16;
using mlkit::index_t;

namespace {

class table {
 public:
  table() {
    text_ << "# Bytes that CUDA kernels ask for\n\n"
             "Made by `tests/cuda/traffic.cu`, which checks it, from the emulation of the kernels: every access of "
             "every thread\n"
             "to device memory counts, as if there were no cache. Beside them stand the bytes that a call has to move: "
             "each\n"
             "operand once, but twice what must be known whole before it is used. Where they agree, the memory of a "
             "GPU bounds\n"
             "the call, as far as occupancy ([cuda_kernels.md](cuda_kernels.md)) keeps enough of them under way. What "
             "linear\n"
             "asks for beyond them are x and A, a few rows that all warps of a block read, so that its L1 cache serves "
             "most.\n"
             "\n"
             "| call | shape | has to move | reads | writes | asked for, of that |\n|---|---|---:|---:|---:|---:|\n";
  }

  /// Bytes that `call` has to move, and how many times these it may ask for.
  template <class Call>
  void add(const std::string& name, const std::string& shape, double bytes, double most, Call&& call) {
    const cuda_emulation::traffic before = cuda_emulation::device_traffic();
    call();
    exec.synchronize();
    const cuda_emulation::traffic after = cuda_emulation::device_traffic();
    const double read = static_cast<double>(after.read - before.read);
    const double written = static_cast<double>(after.written - before.written);
    INFO(name << ' ' << shape << " reads " << read << " and writes " << written << " bytes of " << bytes);
    CHECK(read + written >= bytes);
    CHECK(read + written <= most * bytes);
    text_ << "| " << name << " | " << shape << " | " << std::fixed << std::setprecision(0) << bytes << " | " << read
          << " | " << written << " | " << std::setprecision(3) << (read + written) / bytes << " |\n";
  }
  std::string text() const { return text_.str(); }

  template <class T>
  test::operand<T, 2> numbers(index_t rows, index_t cols, double size = 1) const {
    const mlkit::random_stream random{5, 0};
    std::vector<T> x(static_cast<std::size_t>(rows * cols));
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = static_cast<T>(static_cast<float>(size) * random.normal(i));
    return test::on_device(exec, x, {rows, cols});
  }

  const test::executor exec = test::exec();

 private:
  std::ostringstream text_;
};

std::string shape_of(std::initializer_list<index_t> extents) {
  std::string text;
  for (const index_t n : extents) text += (text.empty() ? "" : " x ") + std::to_string(n);
  return text;
}

void add_gae(table& t, index_t batch, index_t time, bool columns) {
  const auto r = t.numbers<float>(batch, time), v = t.numbers<float>(batch, time), boot = t.numbers<float>(1, batch);
  auto a = t.numbers<float>(batch, time), g = t.numbers<float>(batch, time);
  const auto flags =
      test::on_device(t.exec, std::vector<std::uint8_t>(static_cast<std::size_t>(batch * time)), {batch, time});
  const auto view = [&](auto* data) {
    return mlkit::tensor_view<std::remove_pointer_t<decltype(data)>, 2>(data, {batch, time},
                                                                        {columns ? 1 : time, columns ? batch : 1});
  };
  t.add(columns ? "GAE, time-major" : "GAE", shape_of({batch, time}), 18.0 * static_cast<double>(batch * time), 1.2,
        [&] {
          rl::gae(t.exec,
                  {.rewards = view(static_cast<const float*>(r.data())),
                   .values = view(static_cast<const float*>(v.data())),
                   .terminated = view(static_cast<const std::uint8_t*>(flags.data())),
                   .truncated = view(static_cast<const std::uint8_t*>(flags.data())),
                   .final_values = view(static_cast<const float*>(v.data())),
                   .bootstrap = mlkit::tensor_view<const float, 1>(boot.data(), {batch})},
                  {}, {.advantages = view(a.data()), .returns = view(g.data())});
        });
}

struct loss_of_token {
  MLKIT_HOST_DEVICE float operator()(index_t row, float) const { return static_cast<float>(row); }
};

template <class T>
void add_log_probs(table& t, index_t rows, index_t classes) {
  const auto z = t.numbers<T>(rows, classes, 3);
  auto dz = t.numbers<T>(rows, classes);
  auto logp = t.numbers<float>(1, rows);
  const auto tokens = test::on_device(t.exec, std::vector<std::int32_t>(static_cast<std::size_t>(rows), 7));
  const mlkit::tensor_view<const std::int32_t, 1> y(tokens.data(), {rows});
  const mlkit::tensor_view<float, 1> l(logp.data(), {rows});
  const double bytes = static_cast<double>(rows * classes) * sizeof(T);
  const std::string type = std::string(", ") + mlkit::dtype_name<T>();
  t.add("log-probabilities" + type, shape_of({rows, classes}), bytes, 1.01,
        [&] { rl::log_probs(t.exec, z.view(), y, {}, {.logp = l}); });
  t.add("the same, and the gradient of a loss" + type, shape_of({rows, classes}), 2 * bytes, 1.01,
        [&] { rl::log_probs_and_gradient(t.exec, z.view(), y, {}, loss_of_token{}, {.logp = l}, dz.view()); });
}

void add_ppo(table& t, index_t batch, index_t time) {
  std::vector<test::operand<float, 2>> x;
  for (int i = 0; i < 10; ++i) x.push_back(t.numbers<float>(batch, time, 0.3));
  t.add("PPO loss", shape_of({batch, time}), 40.0 * static_cast<double>(batch * time), 1.06, [&] {
    (void)rl::ppo_loss(t.exec,
                       rl::policy_batch<float>{.log_probs = x[0].view(),
                                               .old_log_probs = x[1].view(),
                                               .advantages = x[2].view(),
                                               .entropies = x[3].view(),
                                               .values = x[4].view(),
                                               .old_values = x[5].view(),
                                               .returns = x[6].view()},
                       {.value_clip = 0.2, .entropy = 0.01},
                       {.log_probs = x[7].view(), .values = x[8].view(), .entropies = x[9].view()});
  });
}

void add_whiten(table& t, index_t n) {
  const auto x = t.numbers<float>(1, n);
  auto y = t.numbers<float>(1, n);
  t.add("whitening", std::to_string(n), 12.0 * static_cast<double>(n), 1.2, [&] {
    (void)rl::whiten(t.exec, mlkit::tensor_view<const float, 1>(x.data(), {n}), {}, {},
                     mlkit::tensor_view<float, 1>(y.data(), {n}));
  });
}

void add_dpo(table& t, index_t n) {
  std::vector<test::operand<float, 2>> x;
  for (int i = 0; i < 6; ++i) x.push_back(t.numbers<float>(1, n));
  const auto in = [&](std::size_t i) { return mlkit::tensor_view<const float, 1>(x[i].data(), {n}); };
  const auto out = [&](std::size_t i) { return mlkit::tensor_view<float, 1>(x[i].data(), {n}); };
  t.add("DPO loss", std::to_string(n), 24.0 * static_cast<double>(n), 1.01, [&] {
    (void)rl::preference_loss(
        t.exec, {.chosen = in(0), .rejected = in(1), .reference_chosen = in(2), .reference_rejected = in(3)}, rl::dpo{},
        {.chosen = out(4), .rejected = out(5)});
  });
}

void add_decode(table& t, index_t tokens, index_t width, index_t rank) {
  const auto x = t.numbers<bf16>(tokens, width), w = t.numbers<bf16>(width, width, 0.02),
             a = t.numbers<bf16>(rank, width, 0.02), b = t.numbers<bf16>(width, rank, 0.02);
  auto y = t.numbers<bf16>(tokens, width);
  const lora::adapter_view<bf16> adapter{a.view(), b.view(), 2.0};
  const double others = 4.0 * static_cast<double>(tokens * width + rank * width);
  const double elements = static_cast<double>(width * width);
  const std::string shape = shape_of({tokens, width, width}) + ", rank " + std::to_string(rank);
  t.add("LoRA linear, bf16", shape, others + 2 * elements, 2.2,
        [&] { lora::linear(t.exec, x, lora::dense{w.view()}, adapter, y); });
  const auto codes = t.numbers<float>(width, width / 4), scales = t.numbers<float>(width, width / 64, 0.02);
  const lora::nf4_view nf4(
      {width, width},
      {reinterpret_cast<const std::uint8_t*>(codes.data()), static_cast<std::size_t>(width * width / 2)},
      {scales.data(), static_cast<std::size_t>(width * width / 64)});
  t.add("LoRA linear, NF4 base", shape, others + elements / 2 + elements / 16, 5,
        [&] { lora::linear(t.exec, x, lora::nf4{nf4}, adapter, y); });
  const lora::int8_view int8(
      {width, width}, {reinterpret_cast<const std::int8_t*>(codes.data()), static_cast<std::size_t>(width * width)},
      {scales.data(), static_cast<std::size_t>(width)});
  t.add("LoRA linear, int8 base", shape, others + elements + 4.0 * static_cast<double>(width), 3.3,
        [&] { lora::linear(t.exec, x, lora::int8{int8}, adapter, y); });
}

}  // namespace

TEST_CASE("kernels ask for little more memory than a call has to move", "[cuda][traffic]") {
  if (!cuda_emulation::watches_memory()) return;
  table t;
  add_gae(t, 64, 1024, false);
  add_gae(t, 64, 1024, true);
  add_log_probs<float>(t, 8, 8192);
  add_log_probs<bf16>(t, 8, 8192);
  add_ppo(t, 64, 256);
  add_whiten(t, 65536);
  add_dpo(t, 8192);
  for (const index_t tokens : {1, 4, 16}) add_decode(t, tokens, 1024, 16);
  const std::string path = test_data("../../docs/cuda_traffic.md");
  if (std::getenv("MLKIT_WRITE_TRAFFIC")) std::ofstream(path) << t.text();
    // What compilers other than GCC leave of the accesses, and what other GPUs are given, may differ a little.
#if !defined(__clang__)
  if (std::getenv("MLKIT_EMULATED_COMPUTE_CAPABILITY")) return;
  std::ifstream file(path);
  CHECK(std::string(std::istreambuf_iterator<char>(file), {}) == t.text());
#endif
}
#endif
