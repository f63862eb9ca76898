// The memory that a call's arguments name: what it writes must be none of what it reads, or writes elsewhere.
#pragma once

#include <string>
#include <vector>

#include "cpu.hpp"
#include "view.hpp"

namespace MLKIT_NAMESPACE::detail {

/// The arguments of one call, in the order in which it names them. Refuses an executor that is none, memory that the
/// executor cannot reach, and an output that shares memory with another argument.
class arguments {
 public:
  template <executor Executor>
  arguments(std::string_view function, const Executor& exec) : function_(function) {
    if constexpr (std::is_same_v<Executor, cpu>) {
      check_executor(exec);
    } else {
      executor_ = &exec;
      check_memory_ = [](const void* e, std::string_view f, std::string_view name, const void* p) {
        static_cast<const Executor*>(e)->check_memory(f, name, p);
      };
    }
    named_.reserve(16);
  }

  template <class T, int Rank>
  void reads(std::string_view name, const tensor_view<T, Rank>& v) {
    add(name, any_view(v), false);
  }
  template <class T, int Rank>
  void writes(std::string_view name, const tensor_view<T, Rank>& v) {
    check_output(function_, name, v);
    add(name, any_view(v), true);
  }

 private:
  struct argument {
    std::string name;
    touched_memory memory;
    bool written;
    int rank;
    std::array<index_t, any_view::most_dimensions> extents;
    std::string text() const { return message(name, " ", list_text(extents.data(), rank)); }
  };

  void add(std::string_view name, const any_view& v, bool written) {
    if (v.empty()) return;
    if (check_memory_) check_memory_(executor_, function_, name, v.data);
    argument added{std::string(name), touched_memory(v), written, v.rank, {}};
    std::copy_n(v.extents, v.rank, added.extents.begin());
    for (const argument& other : named_) {
      if (!(written || other.written) || added.memory.disjoint(other.memory)) continue;
      const argument &output = written ? added : other, &input = written ? other : added;
      fail_shape(function_, ": ", output.text(), " overlaps ", input.text());
    }
    named_.push_back(added);
  }

  std::string_view function_;
  const void* executor_ = nullptr;  // where memory is to be asked for
  void (*check_memory_)(const void*, std::string_view, std::string_view, const void*) = nullptr;
  std::vector<argument> named_;
};

/// The arguments of one part of a call: `q.base`, `q.adapter.a` for the base and adapter of part `q`.
class part_arguments {
 public:
  part_arguments(arguments& call, std::string_view part) : call_(&call), part_(part) {}

  template <class T, int Rank>
  void reads(std::string_view name, const tensor_view<T, Rank>& v) {
    call_->reads(message(part_, ".", name), v);
  }
  template <class T, int Rank>
  void writes(std::string_view name, const tensor_view<T, Rank>& v) {
    call_->writes(message(part_, ".", name), v);
  }

 private:
  arguments* call_;
  std::string_view part_;
};

}  // namespace MLKIT_NAMESPACE::detail
