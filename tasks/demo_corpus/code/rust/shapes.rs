use std::f64::consts::PI;

enum Shape {
    Circle { radius: f64 },
    Rectangle { width: f64, height: f64 },
    Triangle { base: f64, height: f64 },
}

fn area(shape: &Shape) -> f64 {
    match shape {
        Shape::Circle { radius } => PI * radius * radius,
        Shape::Rectangle { width, height } => width * height,
        Shape::Triangle { base, height } => base * height / 2.0,
    }
}

fn main() {
    let garden = [
        Shape::Circle { radius: 1.2 },
        Shape::Rectangle { width: 4.0, height: 2.5 },
        Shape::Triangle { base: 3.0, height: 2.0 },
    ];
    let total: f64 = garden.iter().map(area).sum();
    println!("{total:.2} square metres");
}
