#include <iostream>
#include <memory>
#include <vector>

struct Shape {
    virtual ~Shape() = default;
    virtual double area() const = 0;
};

struct Box : Shape {
    double w, h;
    Box(double w, double h) : w(w), h(h) {}
    double area() const override { return w * h; }
};

struct Disc : Shape {
    double r;
    explicit Disc(double r) : r(r) {}
    double area() const override { return 3.14159265 * r * r; }
};

int main() {
    std::vector<std::unique_ptr<Shape>> all;
    all.push_back(std::make_unique<Box>(2, 5));
    all.push_back(std::make_unique<Disc>(1.5));
    for (const auto& s : all) std::cout << s->area() << '\n';
}
