class Grid
  include Enumerable

  attr_reader :rows

  def initialize(rows)
    widths = rows.map(&:size).uniq
    raise ArgumentError, 'rows differ in length' if widths.size > 1

    @rows = rows
  end

  def flip
    Grid.new(rows.transpose)
  end

  def each(&block)
    rows.flatten.each(&block)
  end

  def to_s
    rows.map { |row| row.map { |n| n.to_s.rjust(3) }.join }.join("\n")
  end
end

grid = Grid.new([[1, 2, 3], [4, 5, 6]])
puts grid.flip
puts grid.max
