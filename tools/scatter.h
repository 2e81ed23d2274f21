// A small picture of measured points: x, y, an error bar, a label and where it was told to be. SVG.
#pragma once

#include <span>
#include <string>

namespace espalier {

struct ScatterPoint {
  double x = 0, y = 0;
  double error = 0;  // of y
  double told = 0;   // of y, drawn hollow
  std::string label;
};

// Both axes begin at zero.
std::string ScatterSvg(std::span<const ScatterPoint> points, const std::string& title,
                       const std::string& x_title, const std::string& y_title);

}  // namespace espalier
