// Log-probabilities, entropies and their gradient, against loops of doubles and torch.
#include "fixtures.hpp"
#include "rows_reference.hpp"

using namespace rows_reference;

TEMPLATE_TEST_CASE("log-probabilities, entropies and gradients of odd sizes", "[rl][log_probs]", float, double,
                   mlkit::bf16, mlkit::f16) {
  std::uint64_t seed = 0;
  for (index_t classes : {1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 1000, 2047, 2048, 2049, 5000})
    for (index_t rows : {1, 3, 70}) {
      if (rows * classes > 100000) continue;
      seed += 10;
      problem<TestType> p(rows, classes, seed, 2, seed % 30 == 0, seed % 7 == 0 ? 3 : 0);
      p.temperature = seed % 20 == 0 ? 0.7 : 1;
      p.run(cpu{.threads = 1 + static_cast<int>(seed / 10 % 3)}, seed % 20 == 0, seed % 40 == 0);
      p.check(bound<TestType>);
    }
}

TEST_CASE("values and gradients of torch's Categorical", "[rl][log_probs]") {
  for (const std::string name : {"plain", "warm", "large"}) {
    const auto of = [&](const std::string& what) { return fixture(name + "." + what, "rl_logits_fixtures.txt"); };
    const auto tokens = of("tokens"), logits = of("logits");
    const auto rows = static_cast<index_t>(tokens.size());
    problem<double> p(rows, static_cast<index_t>(logits.size()) / rows, 1);
    p.memory = logits;
    p.tokens.assign(tokens.begin(), tokens.end());
    p.dlogp = of("dlogp");
    p.dentropy = of("dentropy");
    p.temperature = of("temperature")[0];
    p.run(cpu{}, false);
    double error = 0;
    const auto note = [&](const std::vector<double>& have, const std::string& what) {
      const auto want = of(what);
      for (std::size_t i = 0; i < want.size(); ++i)
        error = std::max(error, std::fabs(have[i] - want[i]) / std::max(1.0, std::fabs(want[i])));
    };
    note(p.logp, "logp"), note(p.entropy, "entropy"), note(p.lse, "lse"), note(p.gradient_memory, "dlogits");
    CHECK(error < 1e-14);
  }
}

TEMPLATE_TEST_CASE("a gradient larger than the caches is that in the place of the logits", "[rl][log_probs]", double,
                   mlkit::bf16) {
  const index_t classes = (index_t{17} << 20) / index_t{sizeof(TestType)} + 3;
  problem<TestType> p(1, classes, 43), q(1, classes, 43);
  p.run(cpu{.threads = 2}, false);
  q.run(cpu{.threads = 2}, false, true);
  CHECK(std::memcmp(p.gradient_memory.data(), q.gradient_memory.data(), p.memory.size() * sizeof(TestType)) == 0);
}
