#include "expert_table.h"

#include <stdexcept>
#include <utility>

namespace moert {
namespace {

uint64_t key(int layer, int expert, int slices) {
  return uint64_t(layer) << 40 | uint64_t(expert) << 8 | uint64_t(slices);
}

NestedMatrix placed(const PlacedMatrix& matrix, const std::vector<uintptr_t>& slices) {
  const auto& [planes, scales, rows, groups, group_size, tables] = matrix;
  std::vector<PlaneTuple> at_addresses;
  for (const auto& [slice, offset, stride, bits, shift] : planes)
    at_addresses.emplace_back(slices.at(slice) + offset, stride, bits, shift);
  return nested_matrix(at_addresses, slices.at(std::get<0>(scales)) + std::get<1>(scales), rows, groups, group_size,
                       tables);
}

}  // namespace

NestedMatrix nested_matrix(const std::vector<PlaneTuple>& planes, uintptr_t scales, int64_t rows, int64_t groups,
                           int group_size, uintptr_t tables) {
  if (planes.empty() || planes.size() > size_t(kMaxPlanes)) throw std::invalid_argument("1 to 8 planes are needed");
  if (group_size != 32 && group_size != 64 && group_size != 128) throw std::invalid_argument("bad group size");
  NestedMatrix m{};
  m.num_planes = int(planes.size());
  int width = 0;
  for (size_t i = 0; i < planes.size(); i++) {
    auto [address, stride, bits, shift] = planes[i];
    m.planes[i] = Plane{reinterpret_cast<const uint8_t*>(address), stride, bits, shift};
    width += bits;
  }
  m.scales = reinterpret_cast<const uint8_t*>(scales);
  m.rows = rows;
  m.tiles = (rows + kTileRows - 1) / kTileRows;
  m.groups = groups;
  m.group_size = group_size;
  m.tables = reinterpret_cast<const uint8_t*>(tables);
  m.scale_groups = tables ? 1 : int(groups);
  m.levels = tables ? 2 * kTrellisBias : (1 << width) - 1;
  m.midpoint = float(m.levels) / 2;
  return m;
}

ExpertTable::ExpertTable(std::vector<std::vector<PlacedMatrix>> places, uintptr_t memory)
    : places_(std::move(places)), memory_(memory) {
  for (const auto& matrices : places_)
    if (matrices.size() != 3) throw std::invalid_argument("an expert has three matrices");
}

void ExpertTable::put(int layer, int expert, const std::vector<size_t>& offsets) {
  if (offsets.size() > places_.size()) throw std::invalid_argument("too many slices");
  std::vector<uintptr_t> slices;
  for (size_t offset : offsets) slices.push_back(memory_ + offset);
  for (size_t n = 0; n < slices.size(); n++) {
    const auto& p = places_[n];
    experts_[key(layer, expert, int(n) + 1)] = {placed(p[0], slices), placed(p[1], slices), placed(p[2], slices)};
  }
}

void ExpertTable::keep(int layer, int expert, int count) {
  for (int n = count + 1; n <= int(places_.size()); n++) experts_.erase(key(layer, expert, n));
}

std::vector<int> ExpertTable::held(int layer, const std::vector<int>& experts) const {
  std::vector<int> result;
  for (int expert : experts) {
    int count = 0;
    while (experts_.count(key(layer, expert, count + 1)) != 0) count++;
    result.push_back(count);
  }
  return result;
}

std::vector<int> ExpertTable::missing(int layer, const std::vector<int>& experts,
                                      const std::vector<int>& slices) const {
  std::vector<int> result;
  for (size_t i = 0; i < experts.size() && i < slices.size(); i++)
    if (experts_.find(key(layer, experts[i], slices[i])) == experts_.end()) result.push_back(int(i));
  return result;
}

std::vector<ExpertMatrices> ExpertTable::find(int layer, const std::vector<int>& experts,
                                              const std::vector<int>& slices) const {
  if (experts.empty() || slices.size() != experts.size())
    throw std::invalid_argument("one number of slices for each expert is needed");
  std::vector<ExpertMatrices> found;
  found.reserve(experts.size());
  for (size_t i = 0; i < experts.size(); i++) {
    const auto place = experts_.find(key(layer, experts[i], slices[i]));
    if (place == experts_.end()) return {};
    found.push_back(place->second);
  }
  return found;
}

}  // namespace moert
