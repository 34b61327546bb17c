class Matrix(private val rows: Vector[Vector[Int]]) {
  require(rows.map(_.size).distinct.size <= 1, "rows must have equal length")

  def transpose: Matrix = new Matrix(rows.transpose)

  def *(other: Matrix): Matrix = {
    val columns = other.rows.transpose
    new Matrix(rows.map { row =>
      columns.map(column => row.zip(column).map { case (a, b) => a * b }.sum)
    })
  }

  override def toString: String = rows.map(_.mkString(" ")).mkString("\n")
}

object Matrix {
  def apply(rows: Vector[Int]*): Matrix = new Matrix(rows.toVector)
}
