#include <cmath>
#include <iostream>
#include <vector>

struct Point {
    double x = 0.0;
    double y = 0.0;
};

double distance(const Point& a, const Point& b) {
    return std::hypot(a.x - b.x, a.y - b.y);
}

double path_length(const std::vector<Point>& path) {
    double total = 0.0;
    for (std::size_t i = 1; i < path.size(); ++i) {
        total += distance(path[i - 1], path[i]);
    }
    return total;
}

int main() {
    const std::vector<Point> walk{{0, 0}, {3, 4}, {3, 10}};
    std::cout << "walked " << path_length(walk) << " km\n";
}
