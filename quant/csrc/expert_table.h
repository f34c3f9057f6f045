// Which experts can be used at once, by layer, expert and number of slices. Nothing here owns weights.
#pragma once

#include <cstddef>
#include <cstdint>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "products.h"

namespace moert {

// (address, stride, bits, shift) from the most significant.
using PlaneTuple = std::tuple<uintptr_t, size_t, int, int>;

// Throws std::invalid_argument where no kernel knows such a matrix.
NestedMatrix nested_matrix(const std::vector<PlaneTuple>& planes, uintptr_t scales, int64_t rows, int64_t groups,
                           int group_size, uintptr_t tables);

// Where a matrix lies in the slices of an expert: planes as (slice, offset, stride, bits, shift) from the most
// significant, (slice, offset) of its scales, rows, groups, group size, tables of the trellis code or 0.
using PlacedPlane = std::tuple<size_t, size_t, size_t, int, int>;
using PlacedMatrix = std::tuple<std::vector<PlacedPlane>, std::tuple<size_t, size_t>, int64_t, int64_t, int, uintptr_t>;

// Its functions are called under the interpreter's lock.
class ExpertTable {
 public:
  // places[n]: gate, up and down of an expert used with n + 1 slices.
  ExpertTable(std::vector<std::vector<PlacedMatrix>> places, uintptr_t memory);

  // Enters the expert whose slices lie at these offsets in memory, with every number of them.
  void put(int layer, int expert, const std::vector<size_t>& offsets);

  // Forgets an expert with more than `count` slices.
  void keep(int layer, int expert, int count);

  // With how many slices each expert is there.
  std::vector<int> held(int layer, const std::vector<int>& experts) const;

  // The positions of those that are not there.
  std::vector<int> missing(int layer, const std::vector<int>& experts, const std::vector<int>& slices) const;

  // The experts, each used with so many slices; none where one of them is not there. The result is the caller's own, so
  // that it stays right when another thread asks or changes the table.
  std::vector<ExpertMatrices> find(int layer, const std::vector<int>& experts, const std::vector<int>& slices) const;

 private:
  std::vector<std::vector<PlacedMatrix>> places_;
  uintptr_t memory_;
  std::unordered_map<uint64_t, ExpertMatrices> experts_;
};

}  // namespace moert
