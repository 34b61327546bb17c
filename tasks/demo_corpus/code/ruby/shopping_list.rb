# A small shopping list with prices in cents.
class ShoppingList
  Item = Struct.new(:name, :price, :quantity) do
    def cost
      price * quantity
    end
  end

  def initialize
    @items = []
  end

  def add(name, price, quantity = 1)
    @items << Item.new(name, price, quantity)
    self
  end

  def total
    @items.sum(&:cost)
  end
end

list = ShoppingList.new
list.add('milk', 119, 2).add('rice', 249)
puts format('Total: %.2f', list.total / 100.0)
