// What forward keeps for maps: the probabilities of a task's queries, not yet over their sums, beside the levels that
// they were relative to; over a head's sums they become its map, and the mean of the heads' is made as these come.

template <class Element, class Problem>
  requires requires(const Problem& p) { p.map; }
struct kept_map<Element, Problem> : attend<Element> {
  using base = attend<Element>;
  using base::group;
  using base::keys_at_once;
  using base::sliver;
  using base::width;
  using typename base::block_plan;
  using typename base::sum;
  using typename base::V;
  static constexpr bool captures = true;

  sum* kept;          // [slivers][height][lanes]: all keys, or the chosen ones
  sum* mean;          // the same, over the heads so far
  sum* levels;        // [slivers][blocks of keys][lanes]
  block_plan* plans;  // [slivers][blocks of keys]
  index_t height, blocks;
  bool every_key;

  // For so many slivers at a time, of a task with so many.
  void lay_out(const Problem& p, index_t slivers, index_t all_slivers, typename base::pieces& all) noexcept {
    const index_t keys = p.k.extents[2];
    every_key = p.map.every_key;
    // The last tile of scores may be written beyond the last key.
    height = every_key ? round_up(keys + group, index_t{group}) : p.map.values.extents[3];
    blocks = ceil_div(keys, keys_at_once);
    all.take(kept, slivers * height * sliver);
    all.take(mean, p.map.averaged ? all_slivers * height * sliver : 0);
    all.take(levels, slivers * blocks * sliver);
    all.take(plans, slivers * blocks);
  }

  void start(index_t at) noexcept {
    for (index_t i = 0; i < blocks; ++i) plans[at / sliver * blocks + i].any = false;
    std::fill_n(levels + at * blocks, blocks * sliver, -base::infinity);
    if (!every_key) std::fill_n(kept + at * height, height * sliver, sum{});
  }

  // Where the scores of a sliver against the keys from j on are made, to stay there as probabilities.
  sum* scores(index_t at, index_t j, index_t lanes, sum* otherwise) const noexcept {
    return every_key ? kept + at * height + j * lanes : otherwise;
  }

  void keep(const Problem& p, index_t b, index_t at, index_t j, index_t n, index_t lanes, const block_plan& plan,
            const sum* probabilities, const sum* level) noexcept {
    const index_t block = at / sliver * blocks + j / keys_at_once;
    plans[block] = plan;
    std::copy_n(level, lanes, levels + block * sliver);
    if (every_key) return;
    for (index_t c = 0; c < height; ++c) {
      const index_t key = p.map.keys(b, c) - j;
      if (key >= 0 && key < n && plan.groups[key / group] != attention::block::empty)
        std::copy_n(probabilities + key * lanes, lanes, kept + at * height + c * lanes);
    }
  }

  // The map of a sliver from what was kept: into its rows of the map, or on top of those of the heads before.
  template <class Place>
  void finish(const Problem& p, index_t b, index_t h, const Place& place, index_t keys, sum scale, const sum* level,
              const sum* total, sum* memory) const noexcept {
    const index_t heads = p.q.extents[1], sliver_blocks = place.home / sliver * blocks, lanes = place.lanes;
    const bool averaged = p.map.averaged;
    sum *from = kept + place.home * height, *to = averaged ? mean + place.at * height : from;
    sum factors[sliver];
    const sum share = averaged ? 1 / static_cast<sum>(heads) : sum{1};
    const auto find_factors = [&](index_t block) {
      const sum* then = levels + (sliver_blocks + block) * sliver;
      for (index_t l = 0; l < lanes; l += width) {
        const V now = V::load(level + l), sums = V::load(total + l);
        const V last = V::select(now == minus_infinity<V>(), V::zero(), now);
        const V risen = exp2_bounded((V::load(then + l) - last) * V(scale * base::log2_e));
        (risen * V::select(sums == V::zero(), V::zero(), V(share) / sums)).store(factors + l);
      }
    };
    const auto add = [&](index_t begin, index_t end) {
      for (index_t r = begin * lanes; r < end * lanes; r += lanes)
        for (index_t l = 0; l < lanes; l += width) {
          V x = V::load(from + r + l) * V::load(factors + l);
          if (averaged && h > 0) x += V::load(to + r + l);
          x.store(to + r + l);
        }
    };
    const auto add_none = [&](index_t begin, index_t end) {
      if (!averaged || h == 0) std::fill(to + begin * lanes, to + end * lanes, sum{});
    };
    if (every_key) {
      index_t next = 0;
      for (index_t block = 0; block < blocks; ++block) {
        const block_plan& plan = plans[sliver_blocks + block];
        if (!plan.any) continue;
        find_factors(block);
        const index_t j = block * keys_at_once;
        plan.each_run(std::min(keys_at_once, keys - j), [&](index_t begin, index_t end) {
          add_none(next, j + begin);
          add(j + begin, j + end);
          next = j + end;
        });
      }
      add_none(next, p.k.extents[2]);
    } else {
      for (index_t c = 0; c < height; ++c) {
        find_factors(p.map.keys(b, c) / keys_at_once);
        add(c, c + 1);
      }
    }
    if (!averaged || h + 1 == heads)
      base::write_turned(to, lanes, place.count, attention::detail::head(p.map.values, b, averaged ? 0 : h),
                         place.first, memory);
  }
};
