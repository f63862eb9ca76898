// The regular expressions of PEFT's rank_pattern and alpha_pattern, matched in time linear in the name's length.
#pragma once

#include <bitset>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "json_text.hpp"

namespace MLKIT_NAMESPACE::detail {

/// Whether a module's name matches a key of rank_pattern or alpha_pattern, as PEFT decides it: Python's
/// re.match(rf"(.*\.)?({key})$", name). Read are literals, `.`, classes, \d \w \s, groups, alternatives, `* + ? {m,n}`
/// (greedy or lazy), `^` and `$`; look-around, back-references and word boundaries are refused with an io_error. A set
/// of states is followed (Thompson, 1968) instead of backtracking, so that no pattern from a file can take long.
class name_pattern {
 public:
  name_pattern(std::string_view key, std::string_view source) : key_(key), source_(source) {
    text_ = "(.*\\.)?(" + key_ + ")$";
    const tree root = alternatives(0);
    if (at_ != text_.size()) refuse("an unbalanced ')'");
    start_ = compile(root, add({state::accept, {}, -1, -1}));
  }

  bool matches(std::string_view name) const {
    std::vector<int> now, next;
    std::vector<std::size_t> seen(states_.size(), 0);
    bool accepted = false;
    for (std::size_t i = 0;; ++i) {
      // Everything reachable without reading a character; `seen` holds the round in which a state was added.
      const auto reach = [&](int from) {
        std::vector<int> stack{from};
        while (!stack.empty()) {
          const int s = stack.back();
          stack.pop_back();
          if (s < 0 || seen[static_cast<std::size_t>(s)] == i + 1) continue;
          seen[static_cast<std::size_t>(s)] = i + 1;
          const state& st = states_[static_cast<std::size_t>(s)];
          if (st.kind == state::split) {
            stack.push_back(st.other);
            stack.push_back(st.next);
          } else if (st.kind == state::begin || st.kind == state::end) {
            if (i == (st.kind == state::begin ? 0 : name.size())) stack.push_back(st.next);
          } else if (st.kind == state::accept) {
            accepted = true;  // the pattern ends in '$', so this is the end of the name
          } else {
            next.push_back(s);
          }
        }
      };
      next.clear();
      if (i == 0) reach(start_);
      for (const int s : now)
        if (states_[static_cast<std::size_t>(s)].set[static_cast<unsigned char>(name[i - 1])])
          reach(states_[static_cast<std::size_t>(s)].next);
      std::swap(now, next);
      if (i == name.size()) return accepted;
      if (now.empty()) return false;
    }
  }

 private:
  using char_set = std::bitset<256>;

  struct state {
    enum kind_t { one_of, split, begin, end, accept } kind;
    char_set set;
    int next, other;
  };

  struct tree {
    enum kind_t { one_of, sequence, either, repeat, begin, end } kind = sequence;
    char_set set = {};
    std::vector<tree> children = {};
    int least = 0, most = 0;  // most < 0: without limit
  };

  static constexpr int most_states = 20'000, most_depth = 64;

  [[noreturn]] void refuse(std::string_view what) const {
    fail_io(source_, ": the pattern ", in_quotes(key_), " has ", what);
  }
  bool more() const noexcept { return at_ < text_.size(); }
  bool take(char c) noexcept {
    if (!more() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  tree alternatives(int depth) {
    if (depth > most_depth) refuse("groups nested too deeply");
    tree either;
    either.kind = tree::either;
    do either.children.push_back(sequence(depth));
    while (take('|'));
    return either;
  }

  tree sequence(int depth) {
    tree all;
    while (more() && text_[at_] != '|' && text_[at_] != ')') {
      tree item = atom(depth);
      for (int times = 0; more(); ++times) {
        int least = 0, most = -1;
        if (take('*')) {
        } else if (take('+')) {
          least = 1;
        } else if (take('?')) {
          most = 1;
        } else if (!counts(least, most)) {
          break;
        }
        (void)take('?');  // a lazy repetition matches the same names
        if (times > 0) refuse("a repetition of a repetition");
        tree repeated;
        repeated.kind = tree::repeat;
        repeated.least = least;
        repeated.most = most;
        repeated.children.push_back(std::move(item));
        item = std::move(repeated);
      }
      all.children.push_back(std::move(item));
    }
    return all;
  }

  // {m}, {m,}, {,n} or {m,n}; anything else is a literal brace, as in Python.
  bool counts(int& least, int& most) {
    const std::size_t start = at_;
    const auto number = [&](int& value) {
      const std::size_t first = at_;
      for (value = 0; more() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_)
        if ((value = value * 10 + (text_[at_] - '0')) > 1000) refuse("a count above 1000");
      return at_ > first;
    };
    if (!take('{')) return false;
    const bool has_least = number(least);
    const bool has_comma = take(',');
    const bool has_most = has_comma && number(most);
    if (!has_least && !has_most) {
      at_ = start;
      return false;
    }
    if (!has_comma) most = least;
    if (has_comma && !has_most) most = -1;
    if (!take('}')) {
      at_ = start;
      return false;
    }
    if (most >= 0 && most < least) refuse("counts in the wrong order");
    return true;
  }

  tree atom(int depth) {
    const char c = text_[at_++];
    tree t;
    switch (c) {
      case '(':
        if (take('?') && !take(':')) refuse("a kind of group that is not read here");
        t = alternatives(depth + 1);
        if (!take(')')) refuse("an unbalanced '('");
        return t;
      case '*':
      case '+':
      case '?': refuse("a repetition of nothing");
      case '^': t.kind = tree::begin; return t;
      case '$': t.kind = tree::end; return t;
      case '.':
        t.set.set();
        t.set.reset('\n');
        break;
      case '[': t.set = char_class(); break;
      case '\\': t.set = escape(); break;
      default: t.set.set(static_cast<unsigned char>(c));
    }
    t.kind = tree::one_of;
    return t;
  }

  char_set escape() {
    if (!more()) refuse("a '\\' at its end");
    const char c = text_[at_++];
    char_set set;
    const auto range = [&](char first, char last) {
      for (char i = first; i <= last; ++i) set.set(static_cast<unsigned char>(i));
    };
    switch (c) {
      case 'd':
      case 'D': range('0', '9'); return c == 'd' ? set : ~set;
      case 'w':
      case 'W': range('0', '9'), range('a', 'z'), range('A', 'Z'), range('_', '_'); return c == 'w' ? set : ~set;
      case 's':
      case 'S': range('\t', '\r'), range(' ', ' '); return c == 's' ? set : ~set;
      case 'n': range('\n', '\n'); return set;
      case 't': range('\t', '\t'); return set;
      default: break;
    }
    if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'))
      refuse("an escape that is not read here");
    set.set(static_cast<unsigned char>(c));
    return set;
  }

  static std::size_t first_of(const char_set& set) noexcept {
    std::size_t i = 0;
    while (i < set.size() && !set[i]) ++i;
    return i;
  }

  char_set char_class() {
    char_set set;
    const bool negated = take('^');
    for (bool first = true;; first = false) {
      if (!more()) refuse("an unbalanced '['");
      if (!first && take(']')) return negated ? ~set : set;
      const auto one = [&]() -> char_set {
        if (take('\\')) return escape();
        return char_set().set(static_cast<unsigned char>(text_[at_++]));
      };
      const char_set low = one();
      if (at_ + 1 < text_.size() && text_[at_] == '-' && text_[at_ + 1] != ']') {
        ++at_;
        const char_set high = one();
        if (low.count() != 1 || high.count() != 1) refuse("a range between classes");
        std::size_t from = first_of(low), to = first_of(high);
        if (to < from) refuse("a range in the wrong order");
        for (; from <= to; ++from) set.set(from);
      } else {
        set |= low;
      }
    }
  }

  int add(state s) {
    if (states_.size() >= most_states) refuse("too many states");
    states_.push_back(s);
    return static_cast<int>(states_.size()) - 1;
  }

  // The first state of a machine for t that goes on to `next`.
  int compile(const tree& t, int next) {
    switch (t.kind) {
      case tree::one_of: return add({state::one_of, t.set, next, -1});
      case tree::begin: return add({state::begin, {}, next, -1});
      case tree::end: return add({state::end, {}, next, -1});
      case tree::sequence:
        next = add({state::split, {}, next, -1});  // so that repeating nothing still counts as a state
        for (std::size_t i = t.children.size(); i-- > 0;) next = compile(t.children[i], next);
        return next;
      case tree::either: {
        int first = compile(t.children.back(), next);
        for (std::size_t i = t.children.size() - 1; i-- > 0;)
          first = add({state::split, {}, compile(t.children[i], next), first});
        return first;
      }
      case tree::repeat: break;
    }
    int first = next;
    if (t.most < 0) {
      first = add({state::split, {}, -1, next});
      const int body = compile(t.children[0], first);
      states_[static_cast<std::size_t>(first)].next = body;
    }
    for (int i = t.least; i < t.most; ++i) first = add({state::split, {}, compile(t.children[0], first), next});
    for (int i = 0; i < t.least; ++i) first = compile(t.children[0], first);
    return first;
  }

  std::string key_, source_, text_;
  std::size_t at_ = 0;
  std::vector<state> states_;
  int start_ = 0;
};

}  // namespace MLKIT_NAMESPACE::detail
