interface Product {
  readonly id: number;
  name: string;
  price: number;
}

export class Cart {
  private readonly lines = new Map<number, { product: Product; count: number }>();

  add(product: Product, count = 1): this {
    const line = this.lines.get(product.id);
    if (line) {
      line.count += count;
    } else {
      this.lines.set(product.id, { product, count });
    }
    return this;
  }

  get total(): number {
    let sum = 0;
    this.lines.forEach(({ product, count }) => {
      sum += product.price * count;
    });
    return Math.round(sum * 100) / 100;
  }
}
